"""Lone tries: how many replicas become wards, which ones, and when a suspect may be tried there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from megatoken.router.core.quarantine import close, wards
from megatoken.router.fleet.circuit import CircuitState
from megatoken.router.fleet.fleet import Endpoint
from tests.support.router_core import CoreFleet


def fleet_with(suspects: int, replicas: int, wait_s: float = 10.0) -> CoreFleet:
    """Suspects that began to wait just now, and no replica that is tried yet."""
    fleet = CoreFleet(replicas=replicas, resume={"wait_s": wait_s}, admission={"replica_slack": 1.0})
    for _ in range(suspects):
        waiting: Any = SimpleNamespace(priority=0, tenant="t", cost_tokens=1, placed_s=fleet.now)
        fleet.pool.queue.push_suspect(waiting)
    return fleet


def offered(fleet: CoreFleet, after_s: float = 0.0) -> list[Endpoint]:
    return list(wards(fleet.state, fleet.pool, fleet.now + after_s))


@pytest.mark.parametrize(
    ("replicas", "suspects", "opened"),
    [
        (1, 1, 1), (1, 100, 1), (2, 100, 1), (3, 100, 1),
        (4, 1, 1), (4, 8, 1), (4, 9, 2), (4, 100, 2), (5, 100, 2),
        (6, 16, 2), (6, 17, 3), (6, 100, 3), (8, 24, 3), (8, 25, 4),
    ],
)  # fmt: skip
def test_eight_suspects_open_a_ward_and_at_most_half_of_a_model_s_replicas_are_wards(
    replicas: int, suspects: int, opened: int
) -> None:
    fleet = fleet_with(suspects, replicas)
    places = offered(fleet)
    assert len(places) == opened
    assert [replica for replica in fleet.replicas if replica.ward] == places
    assert all(replica.cleared for replica in places)
    assert not set(places) & set(fleet.pool.open), "a ward takes no ordinary request"
    assert offered(fleet) == places, "asking again opens no further ones"


def test_a_model_with_more_wards_than_its_suspects_need_opens_no_other() -> None:
    fleet = fleet_with(suspects=1, replicas=5)
    for replica in fleet.replicas[:2]:
        replica.ward = True
    assert offered(fleet) == fleet.replicas[:2]
    assert [replica.ward for replica in fleet.replicas] == [True, True, False, False, False]


def test_only_replicas_that_may_be_used_count_for_the_half() -> None:
    fleet = fleet_with(suspects=100, replicas=4)
    fleet.replicas[3].connected = False
    assert len(offered(fleet)) == 1


@pytest.mark.parametrize(
    ("field", "value", "usable"),
    [
        ("connected", False, False),
        ("gone", True, False),
        ("draining", True, False),
        ("ejected_until_s", 100.0, True),
        ("ejected_until_s", 100.1, False),
        ("in_flight", 3, True),
        ("in_flight", 4, False),
    ],
)
@pytest.mark.parametrize("ward", [False, True])
def test_a_replica_that_takes_no_request_becomes_no_ward_and_stays_none(
    field: str, value: float, usable: bool, ward: bool
) -> None:
    fleet = fleet_with(suspects=1, replicas=1)
    replica = fleet.replicas[0]
    replica.ward = ward
    setattr(replica, field, value)
    offered(fleet)
    assert replica.ward is usable


def test_a_replica_whose_circuit_is_open_becomes_no_ward() -> None:
    fleet = fleet_with(suspects=1, replicas=2)
    fleet.replicas[0].circuit.state = CircuitState.OPEN
    assert offered(fleet) == [fleet.replicas[1]]


@pytest.mark.parametrize(
    ("fields", "chosen"),
    [
        ([{"in_flight": 1}, {"in_flight": 0}], 1),
        ([{"others": 1}, {"in_flight": 3}], 1),
        ([{"leased": 1}, {"others": 2, "in_flight": 1}], 1),
        ([{}, {}], 0),
    ],
)
def test_the_ward_is_the_replica_with_the_fewest_leases_then_other_routers_requests_then_our_own(
    fields: list[dict[str, int]], chosen: int
) -> None:
    fleet = fleet_with(suspects=1, replicas=2)
    for replica, given in zip(fleet.replicas, fields, strict=True):
        for name, value in given.items():
            setattr(replica, name, value)
    offered(fleet)
    assert [replica.ward for replica in fleet.replicas] == [i == chosen for i in range(2)]


@pytest.mark.parametrize(
    ("fields", "after_s", "free"),
    [
        ({}, 0.0, True),
        ({"in_flight": 1}, 0.0, False),
        ({"in_flight": 1}, 2.5, False),
        ({"in_flight": 1}, 2.501, True),
        ({"in_flight": 2, "prompt_outstanding": 7.0}, 2.501, False),
        ({"in_flight": 2, "prompt_outstanding": 7.0}, 9.9, False),
        ({"others": 1}, 2.501, False),
        ({"others": 1}, 5.0, False),
        ({"others": 1}, 5.001, True),
        ({"others": 1, "leased": 1}, 5.001, False),
        ({"leased": 1}, 9.9, False),
        ({"leased": 1, "in_flight": 1}, 0.0, False),
    ],
)
def test_what_keeps_a_suspect_off_a_ward_grows_less_as_it_waits(
    fields: dict[str, float], after_s: float, free: bool
) -> None:
    fleet = fleet_with(suspects=1, replicas=1)
    replica = fleet.replicas[0]
    for name, value in fields.items():
        setattr(replica, name, value)
    assert offered(fleet, after_s) == ([replica] if free else [])
    assert (replica.ward, replica.cleared) == (True, free)


def test_where_a_suspect_may_not_wait_at_all_nothing_but_leases_and_prompts_are_in_its_way() -> None:
    fleet = fleet_with(suspects=1, replicas=1, wait_s=0.0)
    fleet.replicas[0].in_flight = fleet.replicas[0].others = 1
    assert offered(fleet) == []
    assert offered(fleet, 1e-6) == fleet.replicas


def test_without_a_suspect_nothing_was_waited_for() -> None:
    fleet = fleet_with(suspects=0, replicas=1)
    fleet.replicas[0].others = 1
    assert offered(fleet) == []


def test_a_ward_that_was_cleared_once_takes_one_suspect_after_the_other_whoever_runs_there() -> None:
    fleet = fleet_with(suspects=1, replicas=1)
    (replica,) = offered(fleet)
    replica.in_flight, replica.prompt_outstanding = 2, 5.0
    assert offered(fleet) == [replica]
    replica.trial = fleet.pool.queue.first_suspect()
    assert offered(fleet) == [], "one is tried there"
    assert replica.ward


@pytest.mark.parametrize(("ward", "tried", "closed"), [(True, False, True), (True, True, False), (False, False, True)])
def test_a_closed_ward_is_for_everyone_again_unless_a_suspect_is_being_tried_there(
    ward: bool, tried: bool, closed: bool
) -> None:
    fleet = fleet_with(suspects=1, replicas=1)
    replica = fleet.replicas[0]
    replica.ward = replica.cleared = ward
    replica.trial = fleet.pool.queue.first_suspect() if tried else None
    fleet.state.fleet.refresh(replica, fleet.now)
    close(fleet.state, replica, fleet.now)
    assert (replica.ward, replica.cleared) == (not closed, not closed)
    assert fleet.pool.open == ([replica] if closed else [])
