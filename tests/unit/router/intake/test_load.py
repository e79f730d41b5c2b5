"""A worker's load report: others on the replica, signs of life, the limit it is given, and what is measured of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from megatoken.router.fleet.capacity import Capacity
from megatoken.router.fleet.fleet import Endpoint
from megatoken.router.intake.load import take_load
from megatoken.v1 import tokens_pb2
from tests.support.router_core import CoreFleet


@dataclass(slots=True)
class RecordedCapacity(Capacity):
    """Keeps what it is asked to observe."""

    observed: list[tuple[float, int, int, float]] = field(default_factory=list)

    def observe(self, busy_s: float, generated: int, prompt: int, running: float) -> None:
        self.observed.append((busy_s, generated, prompt, running))


def report(fleet: CoreFleet, replica: Endpoint, **fields: int) -> None:
    take_load(fleet.state, replica, tokens_pb2.Load(**fields), fleet.now)


@pytest.mark.parametrize(
    ("running", "waiting", "in_flight", "leased", "others"),
    [
        (0, 0, 0, 0, 0),
        (1, 0, 0, 0, 1),
        (0, 1, 0, 0, 1),
        (5, 2, 3, 2, 2),
        (5, 2, 4, 3, 0),
        (5, 2, 4, 4, 0),
    ],
)
def test_others_are_what_the_worker_has_beyond_our_requests_and_leases(
    running: int, waiting: int, in_flight: int, leased: int, others: int
) -> None:
    fleet = CoreFleet(replicas=1, max_running=40)
    replica = fleet.replicas[0]
    replica.in_flight, replica.leased = in_flight, leased
    report(fleet, replica, running=running, waiting=waiting)
    assert replica.others == others
    assert (replica.running, replica.engine_waiting) == (running, waiting)


@pytest.mark.parametrize(
    ("known", "reported", "alive"),
    [(-1, 0, False), (-1, 7, False), (0, 0, False), (0, 1, True), (7, 7, False), (7, 8, True), (7, 6, True)],
)
def test_a_step_count_that_moved_is_a_sign_of_life_but_the_first_one_is_not(
    known: int, reported: int, alive: bool
) -> None:
    fleet = CoreFleet(replicas=1)
    replica = fleet.replicas[0]
    replica.engine_steps, replica.alive_s = known, 1.0
    report(fleet, replica, steps=reported)
    assert replica.alive_s == (fleet.now if alive else 1.0)
    assert replica.engine_steps == reported


@pytest.mark.parametrize(
    ("batch", "running", "waiting", "limit"),
    [
        (16, 16, 0, 18),
        (16, 16, 4, 18),
        (16, 8, 4, 18),
        (16, 8, 5, 10),
        (32, 9, 4, 36),
        (40, 9, 5, 45),
        (40, 9, 6, 11),
        (40, 0, 6, 2),
        (40, 23, 6, 25),
        (40, 24, 6, 27),
        (40, 32, 6, 36),
        (1, 1, 0, 1),
        (1, 0, 4, 1),
        (1, 0, 5, 2),
    ],
)
def test_an_engine_with_more_waiting_than_an_eighth_of_its_batch_is_limited_to_a_little_over_what_it_runs(
    batch: int, running: int, waiting: int, limit: int
) -> None:
    fleet = CoreFleet(replicas=1, max_running=batch)
    replica = fleet.replicas[0]
    replica.limit = 99
    report(fleet, replica, running=running, waiting=waiting)
    assert replica.limit == limit


def test_a_replica_is_open_as_long_as_its_report_leaves_room() -> None:
    fleet = CoreFleet(replicas=1, max_running=8)
    replica = fleet.replicas[0]
    report(fleet, replica, running=9)
    assert fleet.pool.open == []
    report(fleet, replica, running=8)
    assert fleet.pool.open == [replica]


FIRST = {"prompt_tokens": 1000, "generated_tokens": 2000, "busy_us": 3_000_000, "steps": 400}


@pytest.mark.parametrize(
    ("prompt", "generated", "busy_us", "steps", "counted", "step_s", "observed"),
    [
        (30, 20, 49_999, 10, False, 0.0, []),
        (30, 0, 49_999, 10, False, 0.0, []),
        (30, 20, 50_000, 10, True, 0.005, [(0.05, 20, 30, 5.0)]),
        (30, 20, 200_000, 10, True, 0.02, [(0.2, 20, 30, 5.0)]),
        (30, 20, 200_000, 1, True, 0.2, [(0.2, 20, 30, 5.0)]),
        (30, 20, 200_000, 0, True, 0.0, [(0.2, 20, 30, 5.0)]),
        (0, 1, 200_000, 10, True, 0.02, [(0.2, 1, 0, 5.0)]),
        (30, 0, 200_000, 10, True, 0.02, []),
        (-1, 20, 200_000, 10, True, 0.02, []),
        (30, -1, 49_999, 10, True, 0.0049999, []),
        (30, -1, 1, 1, True, 1e-6, []),
        (30, -1, 0, 10, True, 0.0, []),
        (-1000, -2000, -3_000_000, -400, True, 0.0, []),
    ],
)
def test_what_is_measured_is_the_difference_between_reports_that_lie_far_enough_apart(
    prompt: int,
    generated: int,
    busy_us: int,
    steps: int,
    counted: bool,
    step_s: float,
    observed: list[tuple[float, int, int, float]],
) -> None:
    fleet = CoreFleet(replicas=1)
    replica = fleet.replicas[0]
    replica.capacity = capacity = RecordedCapacity(4)
    report(fleet, replica, running=6, **FIRST)
    assert replica.load_totals == (1000, 2000, 3_000_000, 400)
    assert (replica.step_s, capacity.observed) == (0.0, []), "the first report is measured against nothing"
    second = dict(zip(FIRST, (1000 + prompt, 2000 + generated, 3_000_000 + busy_us, 400 + steps), strict=True))
    report(fleet, replica, running=4, **second)
    assert replica.load_totals == tuple((second if counted else FIRST).values())
    assert replica.step_s == pytest.approx(step_s, rel=1e-9)
    assert replica.steps == (steps if step_s else 0)
    assert capacity.observed == observed
    assert bool(fleet.pool.rates_by_kind) is bool(observed)


@pytest.mark.parametrize(
    ("before", "after", "mean"), [(0, 0, 1.0), (1, 0, 1.0), (1, 1, 1.0), (2, 1, 1.5), (0, 3, 1.5), (6, 4, 5.0)]
)
def test_the_batch_between_two_reports_is_their_mean_and_one_at_least(before: int, after: int, mean: float) -> None:
    fleet = CoreFleet(replicas=1)
    replica = fleet.replicas[0]
    replica.capacity = capacity = RecordedCapacity(4)
    report(fleet, replica, running=before)
    report(fleet, replica, running=after, busy_us=100_000, generated_tokens=5, steps=5)
    assert capacity.observed == [(0.1, 5, 0, mean)]


def test_what_was_measured_is_kept_for_the_next_replica_of_the_kind() -> None:
    fleet = CoreFleet(replicas=1)
    replica = fleet.add_replica("m-x", device_kind="tpu", max_running=24)
    report(fleet, replica)
    report(fleet, replica, running=1, busy_us=100_000, generated_tokens=5, steps=5)
    assert fleet.pool.rates_by_kind == {"tpu": (replica.capacity.rates, 24)}


@pytest.mark.parametrize(
    ("known_s", "known_steps", "steps", "busy_us", "step_s"),
    [
        (0.0, 0, 4, 320_000, 0.08),
        (0.02, 0, 4, 320_000, 0.08),
        (0.02, 4, 4, 320_000, 0.04),
        (0.02, 36, 4, 320_000, 0.02297397),
        (0.02, 996, 4, 320_000, 0.02176637),
        (0.02, 100_000, 64, 5_120_000, 0.0482332),
        (0.08, 996, 4, 80_000, 0.0735079),
    ],
)
def test_a_step_s_time_is_smoothed_as_a_geometric_mean_over_64_steps(
    known_s: float, known_steps: int, steps: int, busy_us: int, step_s: float
) -> None:
    fleet = CoreFleet(replicas=1)
    replica = fleet.replicas[0]
    report(fleet, replica)
    replica.step_s, replica.steps = known_s, known_steps
    report(fleet, replica, busy_us=busy_us, steps=steps)
    assert replica.step_s == pytest.approx(step_s, rel=1e-4)
    assert replica.steps == known_steps + steps
