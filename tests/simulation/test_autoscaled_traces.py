"""The shipped decision on traces: the objective is met, at a price near that of an oracle. Simulated."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from megatoken.cluster.spec.autoscale import AutoscaleSpec
from tests.support import autoscaled_traces as traces

SPEC = AutoscaleSpec(max_replicas=100, utilisation=0.85, ttft_p99_s=3.0, scale_down_after_s=180)
START_S = 30.0
PEAK = 20.0


@pytest.mark.parametrize("lengths", traces.LENGTHS)
@pytest.mark.parametrize("shape", [traces.diurnal, traces.step, traces.flash_crowd, traces.bursty])
def test_the_objective_is_met_at_little_more_than_an_oracle_needs(
    shape: Callable[[float], float], lengths: str
) -> None:
    trace = traces.make_trace(shape, lengths, PEAK, traces.SECONDS, seed=1)
    best = traces.oracle(trace, 3.0, START_S)
    found = traces.autoscaled(trace, SPEC, START_S, first=max(1, round(PEAK * shape(0.0) / 0.85)))
    assert found.met >= 0.99
    assert found.replica_s <= 1.15 * best.replica_s
