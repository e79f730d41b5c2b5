"""A worker says that a stream ended: which ends move the request, and which count against the replica."""

from __future__ import annotations

import pytest

from megatoken.router.core.lifecycle import RequestState
from megatoken.router.fleet.circuit import CircuitState
from megatoken.router.intake.finishes import take_finish
from megatoken.router.intake.first_token import first_token
from megatoken.v1 import tokens_pb2
from tests.support.router_core import CANCELLED, ERROR, LENGTH, STOP, CoreFleet


@pytest.mark.parametrize(
    ("reason", "code", "moves", "failures"),
    [
        (STOP, 0, False, 0), (LENGTH, 0, False, 0), (CANCELLED, 0, True, 0), (CANCELLED, 13, True, 0),
        (ERROR, 1, False, 0), (ERROR, 2, True, 1), (ERROR, 3, False, 0), (ERROR, 4, False, 0), (ERROR, 7, False, 0),
        (ERROR, 8, True, 0), (ERROR, 9, False, 0), (ERROR, 12, False, 0), (ERROR, 13, True, 1), (ERROR, 14, True, 1),
        (ERROR, 15, False, 0), (STOP, 8, False, 0), (STOP, 13, False, 0),
    ],
)  # fmt: skip
def test_what_is_the_worker_s_fault_or_want_of_room_moves_the_request_and_all_else_ends_it(
    reason: int, code: int, moves: bool, failures: int
) -> None:
    fleet = CoreFleet(replicas=2)
    request = fleet.submit()
    replica = fleet.replica_of(request)
    fleet.finish(request, reason, code=code)
    assert request.state is (RequestState.RUNNING if moves else RequestState.FINISHED)
    assert (replica.circuit.failures, replica.in_flight) == (failures, 0)
    assert request.suspected_of == ""
    assert fleet.state.slots.taken == int(moves)
    assert fleet.state.ledger["prompt_tokens"] == (3 if reason in (STOP, LENGTH) else 0)


def test_a_dead_engine_opens_the_circuit_at_once_and_makes_suspects() -> None:
    fleet = CoreFleet(replicas=2)
    request = fleet.submit()
    replica = fleet.replica_of(request)
    fleet.finish(request, ERROR, code=14, engine_dead=True)
    assert (replica.circuit.state, request.suspected_of) == (CircuitState.OPEN, replica.name)
    assert request.state is RequestState.RUNNING


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"reason": ERROR, "code": 13}, "replica m-0 failed it; moved 0 times already"),
        ({"reason": ERROR, "code": 13, "message": "boom"}, "boom; moved 0 times already"),
        ({"reason": ERROR, "code": 8}, "replica m-0 let go of it; moved 0 times already"),
        ({"reason": CANCELLED, "message": "shut"}, "shut; moved 0 times already"),
    ],
)
def test_why_a_replica_let_go_is_told(fields: dict[str, int | str], told: str) -> None:
    fleet = CoreFleet(replicas=1, resume={"max_resumes": 0})
    request = fleet.submit()
    finish = tokens_pb2.Finish(stream=request.slot, **fields)  # type: ignore[arg-type]
    take_finish(fleet.state, fleet.replicas[0], finish, fleet.now)
    end = fleet.end(request)
    assert end is not None
    assert (end.code, end.message) == (14, told)


@pytest.mark.parametrize(("named", "told"), [("", "m-0"), ("behind", "behind")])
def test_a_finish_names_its_replica_and_counts_what_the_client_has(named: str, told: str) -> None:
    fleet = CoreFleet(replicas=1)
    request = fleet.submit()
    fleet.tokens(request, 1, 2)
    fleet.finish(request, generated_tokens=99, cached_tokens=2, replica=named)
    end = fleet.end(request)
    assert end is not None
    assert (end.replica, end.generated_tokens, end.cached_tokens) == (told, 2, 2)
    assert (fleet.state.ledger["cached_tokens"], fleet.pool.measures.cached_tokens) == (2, 2)
    assert request.slot == -1
    fleet.check_idle()
    fleet.finish(fleet.submit(), cached_tokens=3)
    assert (fleet.state.ledger["cached_tokens"], fleet.pool.measures.cached_tokens) == (5, 5)


def test_a_fault_after_the_slot_was_freed_frees_it_no_second_time(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = CoreFleet(replicas=1)
    fleet.state.faults.caught = lambda where, error: None  # type: ignore[method-assign]
    request = fleet.submit()
    monkeypatch.setattr("megatoken.router.intake.finishes.settle", lambda *_: 1 / 0)
    fleet.finish(request)
    end = fleet.end(request)
    assert end is not None
    assert (end.code, fleet.state.slots.taken) == (13, 0)


@pytest.mark.parametrize(("again", "told"), [(1, 3), (2, 3), (3, 3), (4, 4)])
def test_an_end_in_the_middle_of_a_replay_counts_what_the_client_has(again: int, told: int) -> None:
    fleet = CoreFleet(replicas=2)
    request = fleet.submit(seed=1, temperature=1.0)
    fleet.tokens(request, 0, 1, 2)
    fleet.lose(fleet.replica_of(request))
    fleet.tokens(request, *range(again))
    fleet.finish(request)
    end = fleet.end(request)
    assert end is not None
    assert end.generated_tokens == told


def test_ends_of_streams_beyond_the_table_of_other_replicas_and_of_free_slots_are_ignored() -> None:
    fleet = CoreFleet(replicas=2)
    requests = [fleet.submit() for _ in range(2)]
    size = fleet.state.slots.size
    here = fleet.replica_of(requests[0])
    for stream in (requests[1].slot, size - 1, size, size + 1):
        take_finish(fleet.state, here, tokens_pb2.Finish(stream=stream, reason=STOP), fleet.now)
    assert {request.state for request in requests} == {RequestState.RUNNING}
    assert fleet.state.slots.taken == 2


def test_the_first_token_of_an_attempt_clears_request_and_replica_once() -> None:
    fleet = CoreFleet(replicas=1)
    request = fleet.submit(prompt=(1, 2, 3))
    replica = fleet.replicas[0]
    replica.trial, request.suspected_of, request.base_tokens = request, "m-9", 4
    replica.circuit.failures = 2
    fleet.now += 1.5
    for _ in range(2):
        first_token(fleet.state, request, fleet.now)
        assert (replica.trial, request.suspected_of, replica.circuit.failures) == (None, "", 0)
        assert (replica.prompt_outstanding, request.first_s) == (0, fleet.now)
        assert (fleet.state.ledger["prompt_tokens"], fleet.pool.measures.prompt_tokens) == (7, 7)
        assert (int(fleet.pool.measures.first_token_s.counts.sum()), fleet.pool.measures.first_token_s.sum) == (1, 1.5)
    assert fleet.state.latencies.first_token.percentiles_ms((0.5,), fleet.now) == [pytest.approx(1500, rel=0.1)]


def test_a_later_attempt_s_first_token_is_no_first_token_of_the_request() -> None:
    fleet = CoreFleet(replicas=2)
    request = fleet.submit()
    fleet.tokens(request, 1)
    first_s = request.first_s
    fleet.lose(fleet.replica_of(request))
    fleet.now += 9
    fleet.tokens(request, 2)
    assert (request.first_s, int(fleet.pool.measures.first_token_s.counts.sum())) == (first_s, 1)
    assert fleet.state.ledger["prompt_tokens"] == 3 + 4


def test_every_attempt_s_prompt_is_counted() -> None:
    fleet = CoreFleet(replicas=1)
    for turn in (1, 2):
        fleet.tokens(fleet.submit(prompt=(1, 2)), 1)
        assert (fleet.state.ledger["prompt_tokens"], fleet.pool.measures.prompt_tokens) == (2 * turn, 2 * turn)


@pytest.mark.parametrize("failures", [1, 5])
def test_another_request_s_first_token_ends_no_lone_try_and_closes_the_circuit_of_its_replica(failures: int) -> None:
    fleet = CoreFleet(replicas=1, breaker={"failures": failures})
    request, other = fleet.submit(), fleet.submit()
    replica = fleet.replicas[0]
    replica.trial = other
    replica.circuit.trip(fleet.now)
    fleet.state.fleet.refresh(replica, fleet.now)
    assert fleet.pool.open == []
    first_token(fleet.state, request, fleet.now)
    assert (replica.trial, fleet.pool.open) == (other, [replica])


def test_a_request_on_no_replica_has_no_first_token() -> None:
    fleet = CoreFleet(replicas=0)
    fleet.pool.wanted = 1
    request = fleet.submit()
    first_token(fleet.state, request, fleet.now)
    assert (request.first_on_replica, request.first_s) == (False, 0.0)
