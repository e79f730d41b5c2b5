"""A waiting request gets a replica: what the worker is sent, what the slot holds, and what happens to suspects."""

from __future__ import annotations

import random

import pytest

from megatoken.router.core.lifecycle import RequestState
from megatoken.router.core.placement import place_waiting, routing_request
from megatoken.router.fleet.fleet import Endpoint, Pool
from megatoken.router.fleet.routing_request import RoutingRequest
from megatoken.router.streams.slots import DIRECT
from tests.support.router_core import LENGTH, CoreFleet


def test_a_policy_is_told_what_it_may_choose_by() -> None:
    fleet = CoreFleet(replicas=1)
    request = fleet.submit(prompt=(1, 2, 3), max_tokens=9, affinity="a", site="s")
    request.tried, request.prefix_hashes = [2, 0], (7, 8)
    assert routing_request(request) == RoutingRequest(3, 9, "a", "", "s", (7, 8), frozenset({0, 2}))


@pytest.mark.parametrize(("delivery", "call", "direct"), [(0, False, False), (1, False, True), (0, True, True)])
def test_a_first_attempt_s_tokens_go_with_the_session_unless_held_or_of_a_call(
    delivery: int, call: bool, direct: bool
) -> None:
    fleet = CoreFleet(replicas=1)
    if call:
        fleet.sink.index = DIRECT
    request = fleet.submit(delivery=delivery)
    assert int(fleet.state.slots.sink[request.slot]) == (DIRECT if direct else 0)
    assert (request.attempts, request.placed_s, request.first_on_replica) == (1, fleet.now, False)


def test_a_later_attempt_begins_with_its_own_object_and_no_rows_sent() -> None:
    fleet = CoreFleet(replicas=2)
    request = fleet.submit()
    fleet.tokens(request, 1)
    request.prompt_rows_here = 3
    fleet.now += 5
    fleet.lose(fleet.replica_of(request))
    assert int(fleet.state.slots.sink[request.slot]) == DIRECT
    assert (request.attempts, request.placed_s, request.prompt_rows_here) == (2, fleet.now, 0)
    assert (request.first_on_replica, request.carried, request.base_tokens) == (False, b"", 1)
    assert int(fleet.state.slots.generated[request.slot]) == 1


@pytest.mark.parametrize(("made", "ended"), [(3, False), (4, True), (5, True)])
def test_a_request_that_has_all_its_tokens_ends_with_length_where_only_its_finish_was_lost(
    made: int, ended: bool
) -> None:
    fleet = CoreFleet(replicas=2)
    request = fleet.submit(max_tokens=4)
    fleet.tokens(request, *range(made))
    fleet.lose(fleet.replica_of(request))
    end = fleet.end(request)
    if ended:
        assert end is not None
        assert (end.reason, end.generated_tokens, end.resumes) == (LENGTH, made, 1)
        assert end.replica in ("m-0", "m-1")
        fleet.check_idle()
    else:
        assert end is None
        assert fleet.started(request).sampling.max_tokens == 1


def test_a_replay_that_has_all_its_tokens_is_made_again() -> None:
    fleet = CoreFleet(replicas=2)
    request = fleet.submit(max_tokens=2, seed=1, temperature=1.0)
    fleet.tokens(request, 1, 2)
    fleet.lose(fleet.replica_of(request))
    assert fleet.started(request).sampling.max_tokens == 2
    assert (request.replayed, request.replay_at, request.base_tokens) == (b"\1\0\0\0\2\0\0\0", 0, 0)
    assert int(fleet.state.slots.generated[request.slot]) == 0


@pytest.mark.parametrize(("expected", "made", "charged"), [(20, 4, 16), (4, 3, 1), (4, 4, 1), (4, 9, 1), (1, 0, 1)])
def test_an_attempt_is_charged_the_tokens_that_are_still_expected_and_one_at_least(
    expected: int, made: int, charged: int
) -> None:
    fleet = CoreFleet(replicas=2)
    request = fleet.submit(prompt=(1, 2, 3), max_tokens=20)
    request.expected_tokens = expected
    if made:
        fleet.tokens(request, *range(made))
    fleet.lose(fleet.replica_of(request))
    assert (request.charged_prompt, request.charged_decode) == (3 + made, charged)


@pytest.mark.parametrize(("tokens", "first", "second"), [(127, 127, 127), (128, 128, 1), (300, 300, 44)])
def test_whole_blocks_of_a_prompt_that_a_replica_has_are_not_charged_but_one_token_is(
    tokens: int, first: int, second: int
) -> None:
    fleet = CoreFleet(replicas=1)
    fleet.pool.policy = fleet.state.policy_of("prefix")
    charged = [fleet.submit(prompt=tuple(range(tokens))).charged_prompt for _ in range(2)]
    assert charged == [first, second]


def test_the_time_in_the_queue_is_measured_at_each_placement() -> None:
    fleet = CoreFleet(replicas=1, max_running=1, admission={"replica_slack": 1.0})
    first = fleet.submit()
    fleet.submit()
    fleet.now += 2.5
    fleet.finish(first)
    assert (int(fleet.pool.measures.queue_s.counts.sum()), fleet.pool.measures.queue_s.sum) == (2, 2.5)


def test_a_policy_that_finds_no_replica_leaves_the_request_in_its_place() -> None:
    fleet = CoreFleet(replicas=1, max_running=1, admission={"replica_slack": 1.0})
    fleet.submit()
    waiting = fleet.submit()
    fleet.replicas[0].limit = 9
    fleet.state.fleet.refresh(fleet.replicas[0], fleet.now)
    policy = fleet.pool.policy
    fleet.pool.policy = type("Nobody", (), {"choose": lambda *_: None})()
    place_waiting(fleet.state, fleet.pool, fleet.now)
    assert (waiting.state, fleet.pool.queue.length) == (RequestState.QUEUED, 1)
    fleet.pool.policy = policy
    place_waiting(fleet.state, fleet.pool, fleet.now)
    assert waiting.state is RequestState.RUNNING


def test_a_replica_in_the_open_list_without_a_session_costs_the_request_alone() -> None:
    fleet = CoreFleet(replicas=1)
    caught: list[str] = []
    fleet.state.faults.caught = lambda where, error: caught.append(f"{where}: {error}")  # type: ignore[method-assign]
    fleet.replicas[0].link = None
    request = fleet.submit()
    end = fleet.end(request)
    assert end is not None
    assert (end.code, request.attempts) == (13, 0)
    assert caught == ["placement: replica m-0 is in the open list without a session"]
    assert fleet.state.slots.taken == 0


def test_a_start_that_fails_leaves_no_slot_page_or_charge_and_the_client_keeps_its_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fleet = CoreFleet(replicas=2)
    fleet.state.faults.caught = lambda where, error: None  # type: ignore[method-assign]
    request = fleet.submit()
    fleet.tokens(request, 1, 2, 3)
    lost, other = fleet.replica_of(request), next(r for r in fleet.replicas if r is not request.replica)
    monkeypatch.setattr(fleet.link(other), "send_start", lambda slot, raw: 1 / 0)
    fleet.lose(lost)
    end = fleet.end(request)
    assert end is not None
    assert (end.code, end.generated_tokens, request.slot, fleet.state.slots.taken) == (13, 3, -1, 0)
    assert (other.in_flight, other.prompt_outstanding, other.decode_outstanding) == (0, 0, 0)


def test_each_ward_gets_the_suspect_that_waits_longest_and_there_are_none_without_suspects() -> None:
    fleet = CoreFleet(replicas=2, max_running=2, admission={"replica_slack": 1.0})
    requests = [fleet.submit() for _ in range(4)]
    lost, ward = fleet.replicas
    suspects = [request for request in requests if request.replica is lost]
    for request in requests:
        if request.replica is ward:
            fleet.tokens(request, 1)
            fleet.finish(request)
    fleet.lose(lost)
    assert [one.state for one in suspects] == [RequestState.RUNNING, RequestState.RESUMING]
    assert (ward.ward, ward.trial, fleet.pool.has_wards) == (True, suspects[0], True)
    fleet.tokens(suspects[0], 1)
    assert (ward.ward, ward.trial, fleet.pool.has_wards) == (True, suspects[1], True)
    fleet.tokens(suspects[1], 1)
    assert (ward.ward, ward.trial, fleet.pool.has_wards) == (False, None, False)
    assert fleet.pool.queue.suspects == 0


def test_a_suspect_that_cannot_be_started_is_tried_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = CoreFleet(replicas=2)
    fleet.state.faults.caught = lambda where, error: None  # type: ignore[method-assign]
    request = fleet.submit()
    lost, other = fleet.replica_of(request), next(r for r in fleet.replicas if r is not request.replica)
    monkeypatch.setattr(fleet.link(other), "send_start", lambda slot, raw: 1 / 0)
    fleet.lose(lost)
    assert (request.state, other.trial) == (RequestState.FINISHED, None)
    fleet.tick()
    assert not other.ward


def test_a_request_that_no_policy_can_choose_for_is_passed_over_at_once() -> None:
    fleet = CoreFleet(replicas=1, max_running=1, admission={"replica_slack": 1.0})
    fleet.state.faults.caught = lambda where, error: None  # type: ignore[method-assign]
    running = fleet.submit()
    odd, next_one = fleet.submit(affinity="odd"), fleet.submit()
    choose = fleet.pool.policy.choose

    class Picky:
        name, wants_prefix = "picky", False

        def choose(self, pool: Pool, asked: RoutingRequest, rng: random.Random) -> Endpoint | None:
            if asked.affinity == "odd":
                raise ValueError("odd")
            return choose(pool, asked, rng)

    fleet.pool.policy = Picky()
    replica = fleet.replica_of(running)
    replica.limit = 2
    fleet.state.fleet.refresh(replica, fleet.now)
    place_waiting(fleet.state, fleet.pool, fleet.now)
    assert (odd.state, next_one.state) == (RequestState.FINISHED, RequestState.RUNNING)
