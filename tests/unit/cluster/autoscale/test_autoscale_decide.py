"""Known ways to size a fleet wrongly, each with what is decided instead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest

from megatoken.cluster.autoscale.decide import Demand, Memory, Size, Sizing, Why, decide
from megatoken.cluster.spec.autoscale import AutoscaleSpec

SPEC = AutoscaleSpec(min_replicas=1, max_replicas=20, utilisation=0.8, scale_down_after_s=60, queue_s=10)
ZERO = SPEC.model_copy(update={"min_replicas": 0})
START_S = 30.0


def demand(load: float | None = 0.0, **fields: float) -> Demand:
    made = Demand(load=load, requests_per_s=load or 0.0, waiting=0, waiting_work_s=0.0, running=0, tokens_per_s=0.0)
    return replace(made, **fields)  # type: ignore[arg-type]


def size(target: int, ready: int | None = None, slots: int = 10) -> Size:
    return Size(target, target if ready is None else ready, slots, START_S)


def decided(
    spec: AutoscaleSpec, seconds: int, target: int, at: Callable[[int], Demand], memory: Memory | None = None
) -> tuple[list[Sizing], Memory]:
    """Second by second, with replicas that are ready at once; all decisions."""
    memory, found = memory or Memory(), []
    for second in range(seconds):
        decision = decide(spec, at(second), size(target), memory, float(second))
        memory, target = decision.memory, decision.target
        found.append(decision)
    return found, memory


def test_load_is_counted_where_it_arrives_so_an_overloaded_fleet_grows() -> None:
    """Its output stands at what it can do; what arrives does not."""
    decision = decide(SPEC, demand(load=5.0, tokens_per_s=100.0), size(2), Memory(), 0.0)
    assert (decision.target, decision.why) == (7, Why.LOAD)
    assert decision.need == pytest.approx(5.0 / 0.8)


def test_replicas_that_start_are_neither_forgotten_nor_asked_for_again() -> None:
    memory = Memory()
    targets = []
    for second in range(60):
        decision = decide(SPEC, demand(load=1.5), size(2, ready=1), memory, float(second))
        memory = decision.memory
        targets.append(decision.target)
    assert set(targets) == {2}


def test_what_waits_is_worked_off_in_half_of_what_a_start_takes_and_the_reason_says_so() -> None:
    waits = demand(load=0.8, waiting=60, waiting_work_s=90.0)
    decision = decide(SPEC, waits, size(1), Memory(), 0.0)
    assert (decision.target, decision.why) == (7, Why.QUEUE)
    assert decide(SPEC, waits, replace(size(1), start_s=1.0), Memory(), 0.0).target == 10


def test_the_time_that_a_start_takes_is_looked_ahead() -> None:
    found, _ = decided(SPEC, 60, 2, lambda second: demand(load=1.0 + second / 30))
    load_then = 1.0 + 59 / 30
    assert found[-1].target > load_then / 0.8 + 0.9, "load grows by a replica while one starts"
    late = [decision.target for decision in decided(SPEC, 60, 3, lambda _: demand(load=2.0))[0]]
    assert set(late) == {3}, "steady load foresees nothing"


def test_it_shrinks_only_after_fewer_were_enough_for_the_whole_window() -> None:
    found, _ = decided(SPEC, 200, 8, lambda _: demand(load=2.0))
    targets = [decision.target for decision in found]
    assert targets[:60] == [8] * 60
    assert targets[60] == 3
    assert found[60].why is Why.UNUSED
    assert targets[-1] == 3, "2.0 on two replicas would leave no room"


def test_one_late_request_does_not_begin_the_wait_anew() -> None:
    found, _ = decided(SPEC, 100, 8, lambda second: demand(load=6.0 if second == 40 else 2.0))
    assert found[60].target == 3


def test_load_that_still_needs_what_is_there_keeps_it() -> None:
    """Load x N / (N - 1) must fit, not only load."""
    found, _ = decided(SPEC, 300, 4, lambda _: demand(load=0.8 * 2.98))
    assert {decision.target for decision in found} == {4}
    found, _ = decided(SPEC, 300, 4, lambda _: demand(load=0.8 * 2.85))
    assert found[-1].target == 3


def test_noise_about_a_boundary_does_not_swing_between_two_sizes() -> None:
    found, _ = decided(SPEC, 600, 4, lambda second: demand(load=0.8 * (3.0 + 0.08 * (second % 2))))
    targets = [decision.target for decision in found]
    assert sum(one != other for one, other in pairwise(targets)) <= 1


def test_a_count_that_leaked_keeps_nothing_up() -> None:
    found, _ = decided(ZERO, 100, 1, lambda _: demand(load=0.0, running=7, tokens_per_s=0.01))
    assert (found[-1].target, found[60].why) == (0, Why.IDLE)


def test_a_request_that_runs_long_keeps_its_replica() -> None:
    found, _ = decided(ZERO, 300, 1, lambda _: demand(load=0.0, running=1, tokens_per_s=3.0))
    assert found[-1].target == 1


@pytest.mark.parametrize("asked", [{"waiting": 1}, {"requests_per_s": 0.1}])
def test_none_becomes_one_as_soon_as_somebody_asks(asked: dict[str, float]) -> None:
    decision = decide(ZERO, replace(demand(load=None), **asked), size(0), Memory(), 5.0)  # type: ignore[arg-type]
    assert (decision.target, decision.why) == (1, Why.ARRIVAL)
    assert decide(ZERO, demand(load=None), size(0), Memory(), 5.0).target == 0


def test_the_floor_is_not_kept_for_ever_and_holds_while_it_is_meant() -> None:
    assert decided(ZERO, 100, 3, lambda _: demand())[0][-1].target == 0
    assert decided(SPEC, 100, 3, lambda _: demand())[0][-1].target == 1


def test_bounds_hold_whatever_comes_and_the_reason_says_so() -> None:
    assert decide(SPEC, demand(load=500.0), size(3), Memory(), 0.0).target == 20
    full = decide(SPEC, demand(load=500.0), size(20), Memory(), 0.0)
    assert (full.target, full.why) == (20, Why.BOUND)
    assert decide(SPEC, demand(load=30.0), size(25), Memory(), 0.0).target == 20
    assert decide(SPEC.model_copy(update={"min_replicas": 4}), demand(), size(2), Memory(), 0.0).target == 4


def test_until_a_replica_was_measured_places_in_batches_count() -> None:
    decision = decide(SPEC, demand(load=None, requests_per_s=1.0, running=10, waiting=14), size(1), Memory(), 0.0)
    assert decision.target == 3
    unknown = decide(SPEC, demand(load=None, requests_per_s=1.0, running=10), size(1, slots=0), Memory(), 0.0)
    assert unknown.target == 1


def test_a_missed_objective_lowers_the_utilisation_step_by_step_and_comfort_raises_it_again() -> None:
    spec = SPEC.model_copy(update={"ttft_p99_s": 1.0})
    found, memory = decided(spec, 600, 5, lambda _: demand(load=3.0, ttft_s=1.5))
    assert memory.confidence == pytest.approx(0.96**9)
    assert found[-1].target == 6
    again, after = decided(spec, 3000, 6, lambda _: demand(load=3.0, ttft_s=0.2), replace(memory, judged_s=0.0))
    assert after.confidence == pytest.approx(0.95 / 0.8), "and no further than the most that is sensible"
    assert again[-1].target == 4
    between, _ = decided(SPEC.model_copy(update={"itl_p99_s": 0.1}), 300, 5, lambda _: demand(load=3.0, itl_s=0.2))
    assert between[-1].memory.confidence < 1.0


def test_a_miss_without_an_objective_changes_nothing() -> None:
    _, memory = decided(SPEC, 300, 5, lambda _: demand(load=3.0, ttft_s=100.0))
    assert memory.confidence == 1.0
