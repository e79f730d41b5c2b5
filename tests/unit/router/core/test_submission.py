"""A request arrives: what it is taken on as, what is counted, what its caller is charged, and who is refused."""

from __future__ import annotations

from typing import Any

import pytest

from megatoken.errors import DrainingError, OverloadError, RequestError, UnavailableError
from megatoken.router.core.lifecycle import RequestState
from megatoken.router.core.submission import submit
from megatoken.router.identity.api_keys import ApiKey
from megatoken.router.identity.callers import Caller
from megatoken.tokens.frames import pack
from megatoken.v1 import frame_columns_pb2, tokens_pb2
from megatoken.v1.frame_columns_pb2 import GenerateRequest
from tests.support.router_core import CANCELLED, CoreFleet


@pytest.mark.parametrize(("n", "streams"), [(None, [10]), (1, [10]), (2, [10, 11]), (3, [10, 11, 12])])
def test_each_choice_is_a_request_with_the_next_stream_number(n: int | None, streams: list[int]) -> None:
    fleet = CoreFleet(replicas=1)
    fleet.submit(**({} if n is None else {"n": n}), prompt=(1, 2, 3), max_tokens=5)
    requests = list(fleet.sink.requests.values())
    assert [request.stream for request in requests] == streams
    assert [request.choice for request in requests] == list(range(len(streams)))
    assert {(request.prompt_tokens, request.max_tokens, request.arrived_s) for request in requests} == {(3, 5, 100.0)}
    state = fleet.state
    assert (state.live, state.held, state.live_bytes) == (len(streams), 0, sum(len(one.raw) for one in requests))
    assert (state.ledger["requests_started"], fleet.pool.measures.started) == (len(streams), len(streams))
    assert len(state.deadlines) == 0


@pytest.mark.parametrize(("n", "seed", "seeds", "sent_n"), [(1, 7, [7], 1), (3, 7, [7, 8, 9], 1), (2, 0, [0, 1], 1)])
def test_choices_are_seeded_one_after_the_other(n: int, seed: int, seeds: list[int], sent_n: int) -> None:
    fleet = CoreFleet(replicas=1)
    fleet.submit(n=n, seed=seed, temperature=1.0)
    sent = [fleet.started(request).sampling for request in fleet.sink.requests.values()]
    assert [(sampling.seed, sampling.n) for sampling in sent] == [(one, sent_n) for one in seeds]


def test_a_request_that_says_nothing_of_choices_is_sent_as_it_is() -> None:
    fleet = CoreFleet(replicas=1)
    assert not fleet.started(fleet.submit(seed=7)).sampling.HasField("n")


def test_choices_without_a_seed_get_none() -> None:
    fleet = CoreFleet(replicas=1)
    fleet.submit(n=2, temperature=1.0)
    assert not any(fleet.started(one).sampling.HasField("seed") for one in fleet.sink.requests.values())


def test_a_request_without_an_id_gets_the_router_s_and_a_number_in_hexadecimal() -> None:
    fleet = CoreFleet(replicas=1, max_running=64)
    found = [fleet.submit(request_id="mine" if i == 1 else "").request_id for i in range(17)]
    assert (found[0], found[1], found[2], found[10], found[16]) == ("r-1", "mine", "r-2", "r-a", "r-10")


def test_holding_back_is_the_router_s_part_and_no_worker_hears_of_it() -> None:
    fleet = CoreFleet(replicas=1)
    request = fleet.submit(delivery=tokens_pb2.DELIVERY_COALESCE, max_delay_ms=250)
    assert (request.delivery, request.max_delay_s, fleet.state.held) == (tokens_pb2.DELIVERY_COALESCE, 0.25, 1)
    sent = fleet.started(request)
    assert (sent.delivery, sent.max_delay_ms) == (0, 0)


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize(
    ("asked", "resumes"),
    [(tokens_pb2.RESUME_DEFAULT, None), (tokens_pb2.RESUME_ON, True), (tokens_pb2.RESUME_OFF, False)],
)
def test_a_request_says_whether_it_is_resumed_and_else_the_router_does(
    asked: int, resumes: bool | None, enabled: bool
) -> None:
    fleet = CoreFleet(replicas=1, resume={"enabled": enabled})
    assert fleet.submit(resume=asked).resume is (enabled if resumes is None else resumes)


@pytest.mark.parametrize(("timeout_s", "entries"), [(float("inf"), 0), (1e9, 1)])
def test_a_deadline_is_noted_where_there_is_one(timeout_s: float, entries: int) -> None:
    fleet = CoreFleet(replicas=1)
    fleet.submit(timeout_s=timeout_s, n=1)
    assert len(fleet.state.deadlines) == entries


def test_a_key_is_charged_for_every_choice_its_prompt_and_what_is_expected() -> None:
    fleet = CoreFleet(replicas=1)
    key = ApiKey(name="t", sha256="0" * 64, tokens_per_minute=1000, concurrency=9)
    fleet.submit(key=key, n=3, prompt=(1, 2), max_tokens=10)
    usage = fleet.state.callers._usage["t"]
    assert usage.tokens is not None
    assert (usage.live, usage.tokens.level) == (3, 1000 - 36)


def test_a_key_s_weight_decides_how_often_its_turn_comes() -> None:
    fleet = CoreFleet(replicas=1, max_running=1, admission={"replica_slack": 1.0})
    running = fleet.submit()
    heavy = ApiKey(name="heavy", sha256="0" * 64, weight=4.0)
    light = [fleet.submit(tenant="light", max_tokens=10) for _ in range(4)]
    weighty = [fleet.submit(tenant="heavy", key=heavy, max_tokens=10) for _ in range(4)]
    order = []
    for _ in range(8):
        fleet.finish(running)
        running = next(one for one in light + weighty if one.state is RequestState.RUNNING)
        order.append("heavy" if running in weighty else "light")
    assert order == ["light", "heavy", "heavy", "heavy", "heavy", "light", "light", "light"]


@pytest.mark.parametrize(("most", "n", "enters"), [(4, 3, True), (4, 4, False), (3, 2, True), (3, 3, False)])
def test_all_choices_must_fit_under_max_requests(most: int, n: int, enters: bool) -> None:
    fleet = CoreFleet(replicas=1, admission={"max_requests": most})
    fleet.submit()
    if enters:
        fleet.submit(n=n)
    else:
        with pytest.raises(OverloadError, match="max_requests"):
            fleet.submit(n=n)
    assert fleet.state.live == 1 + n * enters


@pytest.mark.parametrize(("spare", "enters"), [(0, True), (-1, False)])
def test_all_choices_bytes_must_fit_under_max_live_bytes(spare: int, enters: bool) -> None:
    message = frame_columns_pb2.GenerateRequest(model="m", prompt=pack((1, 2, 3)), request_id="x" * 1000)
    message.sampling.n = 2
    fleet = CoreFleet(replicas=1, admission={"max_live_bytes": 2 * message.ByteSize() + spare})
    given = (fleet.state, fleet.sink, 0, 1, message, Caller("t"), float("inf"), fleet.now)
    if enters:
        assert len(submit(*given)) == 2
    else:
        with pytest.raises(OverloadError, match="max_live_bytes"):
            submit(*given)


@pytest.mark.parametrize(
    ("settings", "fields", "error", "refused"),
    [
        ({"draining": True}, {}, DrainingError, 1),
        ({}, {"n": 1000}, RequestError, 0),
        ({}, {"key": ApiKey(name="t", sha256="0" * 64, concurrency=1), "n": 2}, OverloadError, 1),
    ],
)
def test_a_refusal_is_counted_unless_the_request_was_wrong_and_leaves_nothing(
    settings: dict[str, Any], fields: dict[str, Any], error: type[Exception], refused: int
) -> None:
    fleet = CoreFleet(replicas=1)
    for name, value in settings.items():
        setattr(fleet.state, name, value)
    for turn in (1, 2):
        with pytest.raises(error):
            fleet.submit(**fields)
        assert fleet.state.ledger.refused == refused * turn
    assert (fleet.state.live, fleet.state.live_bytes, fleet.sink.requests) == (0, 0, {})


def test_who_cannot_own_its_requests_gets_every_choice_s_charge_back() -> None:
    fleet = CoreFleet(replicas=1)
    caught: list[str] = []
    fleet.state.faults.caught = lambda where, error: caught.append(where)  # type: ignore[method-assign]
    key = ApiKey(name="t", sha256="0" * 64, tokens_per_minute=1000, concurrency=9)
    message = frame_columns_pb2.GenerateRequest(model="m", prompt=pack((1, 2, 3)))
    message.sampling.n, message.sampling.max_tokens = 3, 5

    def own(_requests: object) -> None:
        raise ValueError("a secret")

    with pytest.raises(UnavailableError, match=r"^internal error \(ValueError\)$"):
        submit(fleet.state, fleet.sink, 0, 1, message, Caller("t", key), float("inf"), fleet.now, own)
    usage = fleet.state.callers._usage["t"]
    assert usage.tokens is not None
    assert (usage.live, usage.tokens.level, caught, fleet.state.live) == (0, 1000, ["submission"], 0)


def test_a_cancelled_request_ends_once_and_lets_the_next_one_in() -> None:
    fleet = CoreFleet(replicas=1, max_running=1, admission={"replica_slack": 1.0})
    running, waiting = fleet.submit(), fleet.submit()
    for _ in range(2):
        fleet.cancel(running)
        end = fleet.end(running)
        assert end is not None
        assert end.reason == CANCELLED
    assert (waiting.state, fleet.state.live) == (RequestState.RUNNING, 1)


@pytest.mark.parametrize(("policy", "blocks"), [("prefix", 2), ("least_tokens", 0)])
def test_prompts_are_hashed_where_the_policy_asks_and_by_adapter_and_salt(policy: str, blocks: int) -> None:
    fleet = CoreFleet(replicas=1)
    fleet.pool.policy = fleet.state.policy_of(policy)
    found = [
        fleet.submit(prompt=tuple(range(260)), max_tokens=1, **fields).prefix_hashes
        for fields in ({}, {"cache_salt": "a"}, {})
    ]
    assert [len(hashes) for hashes in found] == [blocks] * 3
    assert found[0] == found[2]
    assert (found[0] != found[1]) is bool(blocks)


def test_each_choice_of_a_traced_request_has_a_span_below_the_clients_and_not_below_each_other() -> None:
    fleet, seen = CoreFleet(), []

    def begin(message: GenerateRequest, _now: float) -> str:
        seen.append(message.traceparent)
        message.traceparent = f"span-{len(seen)}"
        return message.traceparent

    fleet.state.on_entered = begin
    first = fleet.submit(traceparent="client", n=3)
    choices = [fleet.sink.requests[first.stream + choice] for choice in range(3)]
    assert seen == ["client"] * 3
    assert [request.span for request in choices] == ["span-1", "span-2", "span-3"]
    assert [GenerateRequest.FromString(request.raw).traceparent for request in choices] == [
        "span-1",
        "span-2",
        "span-3",
    ]
