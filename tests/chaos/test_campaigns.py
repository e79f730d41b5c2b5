"""The short form of every campaign."""

from __future__ import annotations

from typing import Any

import pytest

from tests.chaos.__main__ import campaigns, run_one

SHORT = 0.05


@pytest.mark.parametrize("module", campaigns().values(), ids=campaigns().keys())
async def test_nothing_is_lost_doubled_wrong_or_left(module: Any) -> None:
    outcome = await run_one(module, SHORT)
    assert outcome.clean, outcome.account()
    assert outcome.inputs, "a campaign that does no harm shows nothing"
