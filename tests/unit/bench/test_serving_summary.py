"""What `make bench` makes of its pairs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("tokenizers", reason="tokenizers is not installed")

from tests.bench.bars import rows, status
from tests.bench.serving import BARS, PARTS, REQUESTS, TOKENS, WAYS, summary, table


def bench(ratio: float, added_ms: float, cpu_us: float) -> Any:
    """As a run of eight equal pairs leaves it."""
    count = 8
    return SimpleNamespace(
        offline_rates=[500.0] * count,
        rates={way: [500.0 * ratio] * count for way in WAYS},
        ratios={way: [ratio] * count for way in WAYS},
        ttft_ms={"direct": [25.0] * count, "fleet": [25.0 + added_ms] * count, "edge": [30.0 + added_ms] * count},
        prefix_ttft_ms={"direct": [20.0] * count, "edge": [20.0 + added_ms / 4] * count},
        prefix_cached=[0.99] * count,
        cpu_us={way: {part: [cpu_us * REQUESTS * TOKENS / len(PARTS)] * count for part in PARTS} for way in WAYS},
    )


@pytest.mark.parametrize(("ratio", "added_ms", "cpu_us", "code"), [(0.96, 2.0, 60.0, 0), (0.9, 2.0, 60.0, 1)])
def test_pairs_become_figures_lines_and_a_status(ratio: float, added_ms: float, cpu_us: float, code: int) -> None:
    found = summary(bench(ratio, added_ms, cpu_us))
    assert found["vs_offline"] == {"low": ratio, "median": ratio, "high": ratio}
    assert (found["vs_offline_low"], found["edge_vs_offline_low"], found["pairs"]) == (ratio, ratio, 8)
    assert found["ttft_added_ms_p50"] == pytest.approx(added_ms)
    assert found["edge_path_cpu_us_per_token"]["median"] == pytest.approx(cpu_us)
    assert found["cpu_us_per_request"]["edge_stream"]["router"] == pytest.approx(cpu_us / len(PARTS) * TOKENS)
    assert found["prefix_ttft_ratio"]["median"] == pytest.approx(1 + added_ms / 80)
    assert len(rows(BARS, found)) == len(BARS)
    assert status(rows(BARS, found)) == code
    shown = table(found)
    assert f"{ratio:.3f} ({ratio:.3f} to {ratio:.3f})" in shown
    assert f"{added_ms:.1f} ({added_ms:.1f} to {added_ms:.1f})" in shown
    assert shown.count("MISSED") == (2 if code else 0)
