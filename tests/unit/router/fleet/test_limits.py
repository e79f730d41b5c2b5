"""The ceiling of the fleet, and what is said to hold it back, at each bound."""

from __future__ import annotations

import pytest

from megatoken.router.fleet.limits import ceiling
from tests.support.router_core import CoreFleet


def fleet_with(work: list[float], in_flight: list[int], measured: bool = True) -> CoreFleet:
    """Replicas of a batch of 10, which get 11 requests at most, at 10 tokens a second."""
    fleet = CoreFleet(replicas=len(work), max_running=10)
    for replica, outstanding, requests in zip(fleet.replicas, work, in_flight, strict=True):
        replica.capacity.measured = measured
        replica.capacity.decode_tokens_per_s = 10.0
        replica.decode_outstanding = outstanding
        replica.in_flight = requests
    return fleet


@pytest.mark.parametrize(
    ("work", "in_flight", "expected"),
    [
        ([100.0, 100.0], [5, 5], (1.0, "")),
        ([100.0, 100.0], [5, 4], (1.0, "idle")),
        ([100.0, 80.0], [8, 8], (0.9, "")),
        ([100.0, 79.0], [8, 8], (0.895, "imbalance")),
        ([100.0, 0.0], [8, 0], (0.5, "imbalance")),
        ([100.0, -50.0], [8, 8], (0.5, "imbalance")),
        ([0.0, 0.0], [8, 8], (1.0, "idle")),
        ([-1.0, 0.0], [8, 8], (1.0, "idle")),
        ([1.0, 1.0], [8, 8], (1.0, "")),
    ],
)
def test_the_ceiling_by_work_and_requests(work: list[float], in_flight: list[int], expected: tuple[float, str]) -> None:
    share, why = ceiling(fleet_with(work, in_flight).state.fleet)
    assert (round(share, 6), why) == expected


def test_a_faster_replica_counts_by_its_speed() -> None:
    fleet = fleet_with([900.0, 50.0], [8, 8])
    fleet.replicas[0].capacity.decode_tokens_per_s = 90.0  # 10 s of work at 90, 5 s at 10
    assert ceiling(fleet.state.fleet) == (pytest.approx(0.95), "")


@pytest.mark.parametrize(
    ("waiting", "in_flight", "why"),
    [(0, [11, 11], ""), (1, [11, 11], "queue"), (1, [11, 10], ""), (1, [12, 13], "queue"), (3, [10, 10], "")],
)
def test_a_queue_holds_back_where_every_replica_is_full(waiting: int, in_flight: list[int], why: str) -> None:
    fleet = fleet_with([100.0, 100.0], in_flight)
    fleet.pool.queue.length = waiting
    assert ceiling(fleet.state.fleet) == (1.0, why)


def test_a_queue_is_told_before_what_was_not_measured_and_that_before_imbalance() -> None:
    fleet = fleet_with([100.0, 20.0], [11, 11], measured=False)
    assert ceiling(fleet.state.fleet) == (pytest.approx(0.6), "ramp")
    fleet.pool.queue.length = 1
    assert ceiling(fleet.state.fleet) == (pytest.approx(0.6), "queue")


@pytest.mark.parametrize("lost", ["connected", "draining", "gone"])
def test_only_those_that_serve_count(lost: str) -> None:
    fleet = fleet_with([100.0, 10.0], [8, 8])
    setattr(fleet.replicas[1], lost, lost != "connected")
    assert ceiling(fleet.state.fleet) == (1.0, "")
    setattr(fleet.replicas[0], lost, lost != "connected")
    assert ceiling(fleet.state.fleet) == (0.0, "idle")


def test_no_replica_is_an_idle_fleet_that_can_do_nothing() -> None:
    assert ceiling(CoreFleet(replicas=0).state.fleet) == (0.0, "idle")
