"""What the fleet says of itself, and how its times are moved to the clock of a machine that was started anew."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatoken.cluster.decide.fleet import Block, Fleet, ModelHealth, Replica, on_this_clock, serial_of
from megatoken.cluster.placement.place import BlockedKind, Placement


def replica(replica_id: str, model: str = "m", **fields: float) -> Replica:
    made = Replica(replica_id, model, "v1", 1, Placement(replica_id, model, ()), 900.0)
    return replace(made, since_s=1000.0, **fields)


def test_replicas_are_found_by_id_and_by_model() -> None:
    first, second, other = replica("m-1"), replica("m-12"), replica("n-3", "n")
    fleet = Fleet((first, second, other))
    assert fleet.of_model("m") == (first, second)
    assert fleet.replica("n-3") is other
    assert fleet.replica("m-2") is None
    assert [one.serial for one in fleet.replicas] == [1, 12, 3]
    assert serial_of("a-b-7") == 7


@pytest.mark.parametrize(
    ("kind", "known", "retry_s"),
    [
        (BlockedKind.STARTS, True, 77.0),
        (BlockedKind.STARTS, False, None),
        (BlockedKind.CAPACITY, True, None),
        (None, True, None),
    ],
)
def test_only_a_start_that_waits_after_failures_has_a_time(
    kind: BlockedKind | None, known: bool, retry_s: float | None
) -> None:
    health = {"m": ModelHealth(failures=1, not_before_s=77.0)} if known else {}
    fleet = Fleet(health=health, blocked={} if kind is None else {"m": Block(kind, "why")})
    assert fleet.retry_s("m") == retry_s


def test_on_the_same_clock_nothing_moves() -> None:
    fleet = Fleet((replica("m-1", drain_deadline_s=1100.0),))
    assert on_this_clock(fleet, 1000.0) is fleet
    assert on_this_clock(fleet, 1000.5) is fleet
    assert on_this_clock(Fleet(), 5.0) == Fleet()


@pytest.mark.parametrize("now", [999.5, 10.0])
def test_on_a_clock_that_began_anew_all_that_was_to_come_is_as_far_ahead_as_before(now: float) -> None:
    leased = replica("m-1", drain_deadline_s=1100.0, serves_until_s=1030.0)
    plain = replace(replica("m-2"), since_s=995.0)
    first, second = on_this_clock(Fleet((leased, plain), serial=4), now).replicas
    assert (first.created_s, first.since_s) == (now - 100.0, now)
    assert (first.drain_deadline_s, first.serves_until_s) == (now + 100.0, now + 30.0)
    assert (second.created_s, second.since_s) == (now - 100.0, now - 5.0)
    assert (second.drain_deadline_s, second.serves_until_s) == (None, 0.0)
