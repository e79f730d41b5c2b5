"""What replicas are charged: for requests until their first token and their end, and for leases until they are back."""

from __future__ import annotations

import pytest

from megatoken.router.core import accounts
from megatoken.router.fleet.fleet import Endpoint
from tests.support.router_core import CoreFleet


def charged(replica: Endpoint) -> tuple[int, int, float, float]:
    return replica.in_flight, replica.leased, replica.prompt_outstanding, replica.decode_outstanding


def test_a_request_is_charged_its_prompt_until_its_first_token_and_one_token_less_with_each_that_comes() -> None:
    fleet = CoreFleet(replicas=1)
    replica = fleet.replicas[0]
    other = fleet.submit(prompt=(1, 2), max_tokens=10)
    request = fleet.submit(prompt=(1, 2, 3), max_tokens=20)
    assert charged(replica) == (2, 0, 5, 30)
    fleet.tokens(request, 1)
    assert charged(replica) == (2, 0, 2, 29)
    fleet.tokens(request, 2, 3)
    assert charged(replica) == (2, 0, 2, 27)
    assert accounts.uncharge(fleet.state, request, fleet.now) is replica
    assert charged(replica) == (1, 0, 2, 10)
    assert (request.replica, request.charged_prompt, request.charged_decode) == (None, 0, 0)
    assert accounts.uncharge(fleet.state, request, fleet.now) is None
    assert charged(replica) == (1, 0, 2, 10)
    accounts.uncharge(fleet.state, other, fleet.now)
    assert charged(replica) == (0, 0, 0, 0)


def test_a_request_that_leaves_before_its_first_token_takes_its_prompt_along() -> None:
    fleet = CoreFleet(replicas=1)
    request = fleet.submit(prompt=(1, 2, 3), max_tokens=20)
    fleet.submit(prompt=(1, 2), max_tokens=10)
    fleet.cancel(request)
    assert charged(fleet.replicas[0]) == (1, 0, 2, 10)


def test_a_resumed_request_is_charged_what_is_left_and_its_tokens_so_far_as_prompt() -> None:
    fleet = CoreFleet(replicas=2)
    fleet.submit(prompt=(1, 2), max_tokens=10)
    request = fleet.submit(prompt=(1, 2, 3), max_tokens=20)
    fleet.tokens(request, 1, 2, 3, 4)
    fleet.lose(fleet.replica_of(request))
    there = fleet.replica_of(request)
    assert charged(there) == (2, 0, 2 + 7, 10 + 16)
    fleet.tokens(request, 5)
    assert charged(there) == (2, 0, 2, 10 + 15)
    fleet.cancel(request)
    assert charged(there) == (1, 0, 2, 10)


def test_the_first_request_of_an_idle_replica_wakes_it_and_a_second_one_does_not() -> None:
    fleet = CoreFleet(replicas=1)
    replica = fleet.replicas[0]
    woken = []
    for _ in range(3):
        fleet.now += 1
        fleet.submit()
        woken.append(replica.alive_s)
    assert woken == [101.0, 101.0, 101.0]


def test_whatever_rounding_left_is_forgotten_when_nobody_is_left() -> None:
    fleet = CoreFleet(replicas=1)
    replica = fleet.replicas[0]
    request = fleet.submit()
    accounts.charge_lease(fleet.state, replica, 4, 8, fleet.now)
    replica.prompt_outstanding += 0.5
    replica.decode_outstanding += 0.25
    fleet.cancel(request)
    assert charged(replica) == (0, 1, 4.5, 8.25)
    accounts.uncharge_lease(fleet.state, replica, 4, 8, fleet.now)
    assert charged(replica) == (0, 0, 0.0, 0.0)


def test_a_lease_has_a_place_and_is_charged_in_full_until_it_is_back() -> None:
    fleet = CoreFleet(replicas=1)
    replica = fleet.replicas[0]
    fleet.submit(prompt=(1, 2), max_tokens=10)
    accounts.charge_lease(fleet.state, replica, 4, 8, fleet.now)
    accounts.charge_lease(fleet.state, replica, 1, 2, fleet.now)
    assert charged(replica) == (1, 2, 2 + 5, 10 + 10)
    accounts.uncharge_lease(fleet.state, replica, 4, 8, fleet.now)
    assert charged(replica) == (1, 1, 2 + 1, 10 + 2)


def test_a_place_that_is_taken_or_free_again_closes_and_opens_the_replica() -> None:
    fleet = CoreFleet(replicas=1, max_running=1, admission={"replica_slack": 1.0})
    replica = fleet.replicas[0]
    accounts.charge_lease(fleet.state, replica, 1, 1, fleet.now)
    assert fleet.pool.open == []
    accounts.uncharge_lease(fleet.state, replica, 1, 1, fleet.now)
    assert fleet.pool.open == [replica]
    request = fleet.submit()
    assert fleet.pool.open == []
    accounts.uncharge(fleet.state, request, fleet.now)
    assert fleet.pool.open == [replica]


@pytest.mark.parametrize("own", [True, False])
def test_a_lone_try_is_over_when_its_request_leaves_and_not_when_another_does(own: bool) -> None:
    fleet = CoreFleet(replicas=1)
    request, other = fleet.submit(), fleet.submit()
    replica = fleet.replicas[0]
    replica.trial = request if own else other
    accounts.uncharge(fleet.state, request, fleet.now)
    assert replica.trial is (None if own else other)
