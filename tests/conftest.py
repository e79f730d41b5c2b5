"""How the suite is shared out among pytest-xdist's workers; without `-n` it only orders the tests.

A module's tests stay on one worker, which keeps what they share. Real engines and separate hosts take all cores and
have deadlines, so their tests run one after another on one worker; beside them the other runs what is small.
"""

from __future__ import annotations

import pytest

LARGE = "engines and hosts"
FIRST = (LARGE, "tests/integration", "tests/chaos", "tests/simulation")


def group_of(item: pytest.Item) -> str:
    """What runs on one worker, in order."""
    module = item.nodeid.partition("::")[0]
    return LARGE if item.get_closest_marker("vllm") or module.startswith("tests/netns/") else module


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in its own hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    groups = {item: group_of(item) for item in items}
    for item, group in groups.items():
        item.add_marker(pytest.mark.xdist_group(group))
    order = {prefix: place for place, prefix in enumerate(FIRST)}
    items.sort(key=lambda item: next((at for name, at in order.items() if groups[item].startswith(name)), len(FIRST)))
