"""Requests through the pure core: placed, streamed, ended, cancelled, held back, and told no."""

from __future__ import annotations

import pytest

from megatoken.errors import DeadlineError, DrainingError, OverloadError, RequestError, UnavailableError
from megatoken.router.core.ending import error_finish
from megatoken.router.core.lifecycle import LIFECYCLE, RequestEvent, RequestState
from megatoken.router.fleet.capacity import Rates
from megatoken.router.identity.api_keys import ApiKey
from megatoken.router.intake.intake import on_frames
from megatoken.router.shell.status import router_status
from megatoken.transitions import IllegalTransition
from megatoken.v1 import tokens_pb2
from tests.support.router_core import CANCELLED, ERROR, LENGTH, STOP, CoreFleet


@pytest.mark.parametrize("state", list(RequestState))
@pytest.mark.parametrize("event", list(RequestEvent))
def test_the_life_of_a_request_is_the_table(state: RequestState, event: RequestEvent) -> None:
    legal = LIFECYCLE.legal()
    if (state, event) in legal:
        assert LIFECYCLE.next(state, event) is legal[state, event]
        assert state is not RequestState.FINISHED
    else:
        with pytest.raises(IllegalTransition, match=f"{event} in state {state}"):
            LIFECYCLE.next(state, event)


def test_tokens_and_finish_reach_the_client() -> None:
    fleet = CoreFleet()
    request = fleet.submit(max_tokens=3)
    assert fleet.started(request).sampling.max_tokens == 3
    fleet.tokens(request, 11)
    fleet.tokens(request, 12, 13)
    fleet.finish(request, LENGTH, prompt_tokens=3, cached_tokens=2)
    assert fleet.received(request) == [11, 12, 13]
    end = fleet.end(request)
    assert end is not None
    assert (end.reason, end.generated_tokens, end.prompt_tokens, end.cached_tokens) == (LENGTH, 3, 3, 2)
    ledger = fleet.state.ledger
    assert [ledger[name] for name in ("prompt_tokens", "generated_tokens", "cached_tokens", "requests_finished")] == [
        3,
        3,
        2,
        1,
    ]
    fleet.check_idle()
    assert fleet.state.slots.taken == 0


def test_each_choice_is_a_stream_of_its_own_with_its_own_seed() -> None:
    fleet = CoreFleet()
    request = fleet.submit(n=3, seed=7, temperature=1.0)
    others = [fleet.sink.requests[request.stream + i] for i in range(3)]
    assert [fleet.started(r).sampling.seed for r in others] == [7, 8, 9]
    assert {fleet.started(r).sampling.n for r in others} == {1}
    for i, one in enumerate(others):
        fleet.tokens(one, 20 + i)
        fleet.finish(one)
    assert [fleet.received(request, choice) for choice in range(3)] == [[20], [21], [22]]
    assert all(fleet.end(request, choice) for choice in range(3))
    fleet.check_idle()


def test_a_cancelled_request_ends_at_once_and_late_tokens_are_dropped() -> None:
    fleet = CoreFleet()
    request = fleet.submit(max_tokens=100)
    fleet.tokens(request, 1)
    replica, slot = fleet.replica_of(request), request.slot
    fleet.cancel(request)
    assert fleet.link(replica).cancelled == [slot]
    fleet.frame(replica, stream=[slot], token=[2])
    end = fleet.end(request)
    assert end is not None
    assert (end.reason, end.generated_tokens) == (CANCELLED, 1)
    assert fleet.received(request) == [1]
    assert fleet.state.slots.taken == 1  # until the worker says so
    fleet.frame(replica, finish=[tokens_pb2.Finish(stream=slot, reason=CANCELLED)])
    assert fleet.state.slots.taken == 0
    assert fleet.state.ledger["generated_tokens"] == 2  # what workers made, so that the sums agree
    fleet.check_idle()


def test_requests_over_the_replicas_room_wait_and_go_first_come_first_served() -> None:
    fleet = CoreFleet(replicas=1, max_running=2, admission={"replica_slack": 1.0})
    requests = [fleet.submit(max_tokens=5) for _ in range(4)]
    assert [r.state for r in requests] == [
        RequestState.RUNNING,
        RequestState.RUNNING,
        RequestState.QUEUED,
        RequestState.QUEUED,
    ]
    fleet.finish(requests[0])
    assert requests[2].state is RequestState.RUNNING
    fleet.cancel(requests[3])
    fleet.finish(requests[1])
    fleet.finish(requests[2])
    fleet.check_idle()


def test_lower_priority_numbers_go_first_and_tenants_take_turns() -> None:
    fleet = CoreFleet(replicas=1, max_running=1, admission={"replica_slack": 1.0})
    rushed = ApiKey(name="greedy", sha256="0" * 64, highest_priority=-1)
    running = fleet.submit()
    greedy = [fleet.submit(tenant="greedy", max_tokens=10) for _ in range(5)]
    modest = fleet.submit(tenant="modest", max_tokens=10)
    urgent = fleet.submit(tenant="greedy", key=rushed, priority=-1, max_tokens=10)
    order = []
    while running is not None:
        fleet.finish(running)
        running = next((r for r in [*greedy, modest, urgent] if r.state is RequestState.RUNNING), None)
        order.append(running)
    assert order[0] is urgent
    assert order.index(modest) <= 2


def test_nobody_goes_before_the_others_without_a_key_that_lets_them() -> None:
    fleet = CoreFleet()
    rushed = ApiKey(name="t", sha256="0" * 64, highest_priority=-1)
    for key, asked, allowed in ((None, -1, 0), (rushed, -2, -1)):
        with pytest.raises(RequestError, match=f"priority: {asked} is not allowed; {allowed} or more"):
            fleet.submit(key=key, priority=asked)
    fleet.submit(key=rushed, priority=-1)
    fleet.submit(priority=5)


def test_times_that_a_request_may_ask_for_are_bounded() -> None:
    fleet = CoreFleet(limits={"max_timeout_ms": 1000, "max_delay_ms": 50})
    with pytest.raises(RequestError, match="timeout_ms: 1001 is not allowed; at most 1000"):
        fleet.submit(timeout_ms=1001)
    with pytest.raises(RequestError, match="max_delay_ms: 51 is not allowed; at most 50"):
        fleet.submit(max_delay_ms=51)
    fleet.submit(timeout_ms=1000, max_delay_ms=50)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"max_requests": 2}, "max_requests is 2"),
        ({"max_queued_requests": 1}, "1 requests wait"),
        ({"max_queued_tokens": 10}, "tokens wait"),
    ],
)
def test_more_than_the_bounds_is_refused_with_a_time_to_come_back(settings: dict[str, int], complaint: str) -> None:
    fleet = CoreFleet(replicas=1, max_running=1, admission={"replica_slack": 1.0, **settings})
    fleet.submit(max_tokens=4)
    fleet.submit(max_tokens=4)
    with pytest.raises(OverloadError, match=complaint) as caught:
        fleet.submit(max_tokens=4)
    assert caught.value.retry_after_s > 0
    assert fleet.state.ledger.refused == 1


def test_a_deadline_that_cannot_be_met_is_refused_at_once() -> None:
    fleet = CoreFleet(replicas=1, max_running=1, admission={"replica_slack": 1.0})
    fleet.replicas[0].capacity.measured = True
    fleet.tick()
    fleet.submit(max_tokens=1000)
    fleet.submit(max_tokens=1000)
    with pytest.raises(DeadlineError, match="the deadline is in"):
        fleet.submit(timeout_s=0.001)


def test_a_deadline_that_passes_ends_the_request_wherever_it_is() -> None:
    fleet = CoreFleet(replicas=1, max_running=1, admission={"replica_slack": 1.0})
    running = fleet.submit(timeout_s=5)
    fleet.tokens(running, 1)
    fleet.state.fleet.replicas[0].capacity.decode_tokens_per_s = 1e6
    waiting = fleet.submit(timeout_s=5)
    fleet.tick(6)
    for request in (running, waiting):
        end = fleet.end(request)
        assert end is not None
        assert (end.reason, end.code) == (ERROR, 4)
    fleet.check_idle()


def test_what_arrives_is_counted_with_its_work_whether_or_not_it_may_enter() -> None:
    fleet = CoreFleet(replicas=1, admission={"max_requests": 2})
    measures = fleet.pool.measures
    fleet.submit()
    assert (measures.arrived, measures.arrived_work_s) == (1, 0.0), "nothing was measured yet"
    fleet.pool.rates_by_kind = {"slow": (Rates(0.04, 0.001, 0.002), 4), "cpu": (Rates(0.02, 0.001, 0.001), 4)}
    request = fleet.submit()
    work_s = request.prompt_tokens * 0.001 + request.expected_tokens * (0.02 / 4 + 0.001)
    with pytest.raises(OverloadError):
        fleet.submit()
    assert measures.arrived == 3
    assert measures.arrived_work_s == pytest.approx(2 * work_s)
    (row,) = router_status(fleet.state).models
    assert (row.model, row.arrived_requests, row.measured, row.running, row.queued) == ("m", 3, True, 2, 0)
    assert row.arrived_work_s == pytest.approx(2 * work_s)


def test_no_replica_and_none_wanted_says_so() -> None:
    fleet = CoreFleet(replicas=0)
    with pytest.raises(UnavailableError, match="no replica, and none is wanted"):
        fleet.submit()
    fleet.pool.wanted = 1
    fleet.pool.blocked = "1 device is missing"
    with pytest.raises(UnavailableError, match="1 device is missing"):
        fleet.submit()
    fleet.pool.blocked = ""
    request = fleet.submit()  # one is on its way
    assert request.state is RequestState.QUEUED
    fleet.add_replica("m-9")
    assert request.state is RequestState.RUNNING


def test_a_request_error_of_the_worker_is_passed_on_and_never_counts_against_it() -> None:
    fleet = CoreFleet(replicas=1)
    for _ in range(20):
        request = fleet.submit()
        replica = fleet.replica_of(request)
        fleet.finish(request, ERROR, code=3, message="grammar: ...")
        end = fleet.end(request)
        assert end is not None
        assert (end.code, end.message) == (3, "grammar: ...")
    assert replica.circuit.failures == 0
    assert fleet.submit().state is RequestState.RUNNING


def test_coalesced_delivery_holds_back_all_but_the_first_token() -> None:
    fleet = CoreFleet()
    request = fleet.submit(delivery=1, max_delay_ms=100)
    fleet.tokens(request, 1)
    assert fleet.received(request) == [1]
    fleet.tokens(request, 2)
    fleet.tokens(request, 3)
    assert fleet.received(request) == [1]
    fleet.tick(0.11)
    assert fleet.received(request) == [1, 2, 3]
    fleet.tokens(request, 4)
    fleet.finish(request)
    assert fleet.received(request) == [1, 2, 3, 4]
    fleet.check_idle()


def test_first_then_all_is_two_pieces() -> None:
    fleet = CoreFleet()
    request = fleet.submit(delivery=2)
    for token in range(40):
        fleet.tokens(request, token)
    assert fleet.received(request) == [0]
    fleet.finish(request)
    assert fleet.received(request) == list(range(40))
    pieces = [count for frame in fleet.frames for count in frame.count or [1] * len(frame.stream) if frame.token]
    assert pieces == [1, 39]
    assert fleet.state.held == 0


@pytest.mark.parametrize("delivery", [1, 2])
@pytest.mark.parametrize("how", ["deadline", "worker", "cancel", "no_replica", "in_a_replay"])
def test_held_tokens_are_given_before_any_kind_of_end(delivery: int, how: str) -> None:
    seeded = {"seed": 5, "temperature": 1.0} if how == "in_a_replay" else {}
    fleet = CoreFleet(replicas=2 if seeded else 1, resume={"wait_s": 5.0})
    request = fleet.submit(delivery=delivery, max_delay_ms=60_000, timeout_s=20.0, **seeded)
    for token in (1, 2, 3):
        fleet.tokens(request, token)
    assert fleet.received(request) == [1]
    if how == "worker":
        fleet.finish(request, ERROR, code=3)
    elif how == "cancel":
        fleet.cancel(request)
    elif how == "no_replica":
        fleet.lose(fleet.replicas[0])
        fleet.tick(6)
    else:
        if seeded:
            fleet.lose(fleet.replica_of(request))
            fleet.tokens(request, 1)
        fleet.tick(21)
    end = fleet.end(request)
    assert end is not None
    assert (fleet.received(request), end.generated_tokens) == ([1, 2, 3], 3)
    assert fleet.state.ledger.delivered_tokens == 3


def test_coalesced_tokens_are_due_while_their_request_waits_for_another_replica() -> None:
    fleet = CoreFleet(replicas=1)
    request = fleet.submit(delivery=1, max_delay_ms=100)
    fleet.tokens(request, 1)
    fleet.tokens(request, 2)
    fleet.lose(fleet.replicas[0])
    fleet.tick(0.2)
    assert fleet.received(request) == [1, 2]
    fleet.connect(fleet.replicas[0])
    fleet.tokens(request, 3)
    fleet.finish(request)
    assert fleet.received(request) == [1, 2, 3]


def test_details_stay_with_their_tokens() -> None:
    fleet = CoreFleet()
    first, second = fleet.submit(), fleet.submit()
    for request in (first, second):
        detail = tokens_pb2.Detail(
            stream=request.slot, logprobs=tokens_pb2.Logprobs(width=1, token=[5], logprob=[-0.5], rank=[1])
        )
        fleet.frame(fleet.replica_of(request), stream=[request.slot], token=[5], detail=[detail])
    fleet.collect()
    seen = [detail.stream for frame in fleet.frames for detail in frame.detail]
    assert seen == [first.stream, second.stream]


def test_wrong_requests_name_field_value_and_what_is_allowed() -> None:
    fleet = CoreFleet()
    for fields, complaint in (
        ({"prompt": ()}, "prompt: '' is not allowed; at least one token id"),
        ({"prompt": (50_000,)}, "prompt: 50000 is not allowed; token ids below the vocabulary's size, 50000"),
        ({"max_tokens": 0}, "max_tokens: 0"),
        ({"max_tokens": 4094}, "max_tokens: 4094 is not allowed; at most 4093"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens: 9"),
        ({"temperature": float("nan")}, "temperature: nan"),
        ({"top_p": 0.0}, "top_p: 0.0"),
        ({"n": 1000}, "n: 1000 is not allowed; 1 to 128"),
        ({"presence_penalty": 3.0}, "presence_penalty: 3.0"),
        ({"model": "x"}, "model: 'x' is not allowed; one of: m"),
    ):
        with pytest.raises(RequestError) as caught:
            fleet.submit(**fields)
        assert complaint in str(caught.value)
    assert fleet.state.live == 0


def test_a_malformed_frame_cuts_the_session_and_nobody_else() -> None:
    fleet = CoreFleet(replicas=2, max_running=1, admission={"replica_slack": 1.0})
    a, b = fleet.submit(), fleet.submit()
    bad, good = fleet.replica_of(a), fleet.replica_of(b)
    link = fleet.link(bad)
    frame = tokens_pb2.Frame(stream=[b.slot], token=[9]).SerializeToString()
    on_frames(fleet.state, [(bad, b"\xff\xff"), (good, frame)], fleet.now)
    assert "malformed" in link.cuts[0]
    assert fleet.received(b) == [9]


def test_tokens_for_streams_of_another_replica_are_dropped_and_counted() -> None:
    fleet = CoreFleet(replicas=2, max_running=1, admission={"replica_slack": 1.0})
    a, b = fleet.submit(), fleet.submit()
    fleet.frame(fleet.replica_of(b), stream=[a.slot, b.slot], token=[7, 8])
    assert (fleet.received(a), fleet.received(b)) == ([], [8])
    assert fleet.state.ledger.foreign_tokens == 1
    fleet.finish(a, STOP)
    fleet.finish(b, STOP)
    fleet.check_idle()


def test_what_ended_leaves_nothing_in_memory_whatever_its_deadline_was() -> None:
    fleet = CoreFleet(replicas=1)
    for turn in range(1000):
        request = fleet.submit(timeout_s=86_400.0 * 49, cache_salt="x" * 1000)
        replica, slot = fleet.replica_of(request), request.slot
        if turn % 2:
            fleet.cancel(request)
        end = tokens_pb2.Finish(stream=slot, reason=tokens_pb2.FINISH_REASON_STOP)
        fleet.frame(replica, finish=[end])
    assert len(fleet.state.deadlines) <= 130
    assert (fleet.state.live_bytes, request.raw) == (0, b"")
    fleet.check_idle()


def test_the_heap_of_holds_follows_what_is_live() -> None:
    fleet = CoreFleet(replicas=1)
    for _ in range(1000):
        request = fleet.submit(delivery=tokens_pb2.DELIVERY_COALESCE, max_delay_ms=3_600_000)
        fleet.tokens(request, 1)
        fleet.tokens(request, 2)
        fleet.finish(request)
    assert len(fleet.state.holds) <= 130


def test_the_bytes_of_live_requests_are_bounded_and_come_back() -> None:
    fleet = CoreFleet(replicas=1, admission={"max_live_bytes": 100_000})
    first = fleet.submit(cache_salt="x" * 60_000)
    with pytest.raises(OverloadError, match="max_live_bytes, 100000"):
        fleet.submit(cache_salt="x" * 60_000)
    with pytest.raises(OverloadError, match="max_live_bytes"):
        fleet.submit(cache_salt="x" * 20_000, n=3)
    fleet.finish(first)
    fleet.submit(cache_salt="x" * 20_000, n=3)
    assert 60_000 < fleet.state.live_bytes < 61_000


def test_a_drain_is_a_field_of_the_finish_and_not_only_a_sentence() -> None:
    fleet = CoreFleet()
    fleet.state.draining = True
    with pytest.raises(DrainingError) as refused:
        fleet.submit()
    assert error_finish(7, refused.value).draining
    assert not error_finish(7, UnavailableError("no replica")).draining
