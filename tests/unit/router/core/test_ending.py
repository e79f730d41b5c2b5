"""A request is over: what its Finish says, and what is settled with queue, replica, ledger and key."""

from __future__ import annotations

import pytest

from megatoken.errors import DrainingError, MegatokenError, OverloadError, RequestError, UnavailableError
from megatoken.router.core.ending import end, error_finish, fail, generated_by
from megatoken.router.core.lifecycle import RequestState
from megatoken.router.core.request import Request
from megatoken.router.identity.api_keys import ApiKey
from megatoken.v1 import tokens_pb2
from tests.support.router_core import CANCELLED, ERROR, LENGTH, STOP, CoreFleet


def finish_of(fleet: CoreFleet, request: Request) -> tokens_pb2.Finish:
    found = fleet.end(request)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("error", "code", "message", "draining", "retry_after_ms"),
    [
        (UnavailableError("no replica"), 14, "no replica", False, 0),
        (DrainingError("it drains"), 14, "it drains", True, 0),
        (RequestError("n", 0, "1 or more"), 3, "n: 0 is not allowed; 1 or more", False, 0),
        (OverloadError("full", 0.0), 8, "full", False, 1),
        (OverloadError("full", 0.0004), 8, "full", False, 1),
        (OverloadError("full", 0.0016), 8, "full", False, 2),
        (OverloadError("full", 1.5), 8, "full", False, 1500),
        (ValueError("a secret"), 13, "internal error (ValueError)", False, 0),
    ],
)
def test_an_error_s_finish_tells_its_code_and_text_and_of_a_fault_of_ours_the_type_alone(
    error: Exception, code: int, message: str, draining: bool, retry_after_ms: int
) -> None:
    finish = error_finish(7, error)
    assert (finish.stream, finish.reason, finish.code, finish.message) == (7, ERROR, code, message)
    assert (finish.draining, finish.retry_after_ms) == (draining, retry_after_ms)


def test_what_a_request_has_generated_stands_in_its_slot_its_replay_or_what_it_carries() -> None:
    fleet = CoreFleet(replicas=1)
    request = fleet.submit()
    assert generated_by(fleet.state, request) == 0
    fleet.tokens(request, 1, 2)
    assert generated_by(fleet.state, request) == 2
    request.replayed = bytes(4 * 3)
    assert generated_by(fleet.state, request) == 3
    request.replayed = bytes(4 * 1)
    assert generated_by(fleet.state, request) == 2
    request.slot, request.carried = -1, bytes(4 * 5)
    assert generated_by(fleet.state, request) == 5


def test_slot_0_is_a_slot() -> None:
    fleet = CoreFleet(replicas=1)
    request = fleet.submit()
    fleet.tokens(request, 1)
    assert request.slot == 0
    fleet.cancel(request)
    assert finish_of(fleet, request).generated_tokens == 1
    assert fleet.link(fleet.replicas[0]).cancelled == [0]


def test_a_request_that_ends_while_it_waits_leaves_the_queue_with_what_it_carries() -> None:
    fleet = CoreFleet(replicas=1)
    request = fleet.submit()
    fleet.tokens(request, 1, 2, 3)
    fleet.lose(fleet.replicas[0])
    assert (request.state, fleet.pool.queue.length) == (RequestState.RESUMING, 1)
    fleet.cancel(request)
    finish = finish_of(fleet, request)
    assert (finish.reason, finish.generated_tokens, finish.prompt_tokens, finish.resumes) == (CANCELLED, 3, 3, 1)
    fleet.check_idle()


def test_a_request_that_never_had_a_replica_generated_nothing() -> None:
    fleet = CoreFleet(replicas=0)
    fleet.pool.wanted = 1
    request = fleet.submit(prompt=(1, 2, 3, 4))
    fleet.cancel(request)
    finish = finish_of(fleet, request)
    assert (finish.generated_tokens, finish.prompt_tokens, finish.resumes) == (0, 4, 0)
    fleet.check_idle()


def test_an_ended_stream_is_an_orphan_until_its_worker_confirms_and_its_pages_are_free() -> None:
    fleet = CoreFleet(replicas=1)
    request = fleet.submit()
    fleet.tokens(request, 1)
    replica = fleet.replicas[0]
    replica.link = None
    fleet.now += 2
    end(fleet.state, request, tokens_pb2.Finish(reason=CANCELLED), fleet.now)
    assert (request.slot, fleet.state.slots.taken, fleet.state.slots.page[0]) == (-1, 1, -1)
    assert fleet.state.slots.orphans(fleet.now + 0.1).tolist() == [0]
    assert (replica.in_flight, request.replica) == (0, None)


@pytest.mark.parametrize(("reported", "resumed", "told"), [(0, False, 3), (7, False, 7), (7, True, 3)])
def test_prompt_tokens_are_the_worker_s_count_unless_its_prompt_held_what_was_generated(
    reported: int, resumed: bool, told: int
) -> None:
    fleet = CoreFleet(replicas=2)
    request = fleet.submit(prompt=(1, 2, 3))
    if resumed:
        fleet.tokens(request, 1)
        fleet.lose(fleet.replica_of(request))
    fleet.finish(request, prompt_tokens=reported)
    assert finish_of(fleet, request).prompt_tokens == told


@pytest.mark.parametrize(("resumes", "note", "told"), [(0, "x", ""), (1, "x", "x"), (1, "", ""), (2, "y", "y")])
def test_the_note_on_a_resume_is_told_only_where_there_was_one(resumes: int, note: str, told: str) -> None:
    fleet = CoreFleet(replicas=1)
    request = fleet.submit()
    request.resumes, request.resume_note = resumes, note
    fleet.finish(request)
    finish = finish_of(fleet, request)
    assert (finish.resumes, finish.resume_note) == (resumes, told)


@pytest.mark.parametrize(
    ("reason", "failed", "outcome"),
    [(STOP, False, "stop"), (LENGTH, False, "length"), (CANCELLED, True, "cancelled"), (ERROR, True, "error")],
)
def test_the_ledger_and_the_model_s_expectation_take_in_how_it_ended(reason: int, failed: bool, outcome: str) -> None:
    fleet = CoreFleet(replicas=1)
    request = fleet.submit(max_tokens=10)
    fleet.tokens(request, 1, 2)
    fleet.now += 1.5
    end(fleet.state, request, tokens_pb2.Finish(reason=reason), fleet.now)
    ledger, pool = fleet.state.ledger, fleet.pool
    assert (ledger["requests_failed"], ledger["requests_finished"]) == (int(failed), int(not failed))
    assert (pool.outputs_seen, pool.output_share) == ((0, 1.0) if failed else (1, 0.2))
    assert pool.measures.outcomes[outcome] == 1
    assert pool.measures.whole_s.sum == 1.5


def test_counts_of_live_and_held_requests_and_their_bytes_come_back() -> None:
    fleet = CoreFleet(replicas=1)
    requests = [fleet.submit(delivery=delivery) for delivery in (0, 1, 2)]
    state = fleet.state
    sizes = [len(request.raw) for request in requests]
    assert (state.live, state.held, state.live_bytes) == (3, 2, sum(sizes))
    for request, expected in zip(requests, [(2, 2), (1, 1), (0, 0)], strict=True):
        fleet.cancel(request)
        assert (state.live, state.held) == expected
        assert (request.raw, request.carried, request.replayed, request.held_details) == (b"", b"", b"", [])
    assert state.live_bytes == 0


def test_a_key_gets_back_what_it_was_charged_beyond_prompt_and_answer() -> None:
    fleet = CoreFleet(replicas=1)
    key = ApiKey(name="t", sha256="0" * 64, tokens_per_minute=1000, concurrency=1)
    request = fleet.submit(prompt=(1, 2, 3), max_tokens=100, key=key)
    usage = fleet.state.callers._usage["t"]
    assert usage.tokens is not None
    assert (usage.live, usage.tokens.level) == (1, 1000 - 103)
    fleet.tokens(request, 1, 2)
    fleet.finish(request)
    assert (usage.live, usage.tokens.level) == (0, 1000 - 5)


@pytest.mark.parametrize(("timeout_s", "left"), [(float("inf"), 0), (5.0, 1)])
def test_only_a_request_with_a_deadline_leaves_an_entry_behind(timeout_s: float, left: int) -> None:
    fleet = CoreFleet(replicas=1)
    fleet.cancel(fleet.submit(timeout_s=timeout_s))
    assert fleet.state.deadlines._ended == left
    assert len(fleet.state.deadlines) == left


@pytest.mark.parametrize("delivery", [tokens_pb2.DELIVERY_COALESCE, tokens_pb2.DELIVERY_FIRST_THEN_ALL])
def test_only_a_request_with_held_tokens_that_are_due_leaves_an_entry_behind(delivery: int) -> None:
    fleet = CoreFleet(replicas=1)
    request = fleet.submit(delivery=delivery, max_delay_ms=50)
    for token in (1, 2):
        fleet.tokens(request, token)
    fleet.cancel(request)
    assert fleet.state.holds._ended == int(delivery == tokens_pb2.DELIVERY_COALESCE)


def test_a_fault_ends_a_request_once_and_its_text_stays_here() -> None:
    fleet = CoreFleet(replicas=1)
    caught: list[tuple[str, str]] = []
    fleet.state.faults.caught = lambda where, error: caught.append((where, str(error)))  # type: ignore[method-assign]
    request = fleet.submit()
    for _ in range(2):
        fail(fleet.state, request, "delivery", ValueError("a secret"), fleet.now)
    finish = finish_of(fleet, request)
    assert (finish.stream, finish.code, finish.message) == (request.stream, 13, "internal error (ValueError)")
    assert caught == [("delivery", "a secret")] * 2


def test_a_sink_that_fails_twice_is_not_tried_a_third_time() -> None:
    fleet = CoreFleet(replicas=1)
    caught: list[str] = []
    fleet.state.faults.caught = lambda where, error: caught.append(where)  # type: ignore[method-assign]
    tries: list[int] = []

    def refuse(request: Request, _finish: bytes) -> None:
        tries.append(request.stream)
        raise MegatokenError("no")

    fleet.sink.push_finish = refuse  # type: ignore[method-assign]
    request = fleet.submit()
    fleet.cancel(request)
    assert (tries, caught) == ([request.stream] * 2, ["delivery"] * 2)
