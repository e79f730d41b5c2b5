"""Frames to receivers: order, mixed frames, cancelled numbers, a lost link."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from megatoken.router.edge.router_session.session import Session
from megatoken.tokens.frames import MalformedFrame, pack
from megatoken.v1.frame_columns_pb2 import Frame, GenerateRequest
from megatoken.v1.tokens_pb2 import (
    FINISH_REASON_CANCELLED,
    FINISH_REASON_ERROR,
    FINISH_REASON_LENGTH,
    FINISH_REASON_STOP,
    RESUME_OFF,
    RESUME_ON,
    Detail,
    Finish,
    Logprobs,
    SamplingParams,
)

ALL = range(1 << 32)


class Recorder:
    """A receiver that keeps what it was fed."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.tokens: list[int] = []
        self.details: list[Detail] = []
        self.finish: Finish | None = None

    def feed(self, tokens: list[int], details: list[Detail] | None, finish: Finish | None) -> None:
        if self.finish is not None:
            raise RuntimeError("fed after its finish")
        self.tokens += tokens
        self.details += details or []
        self.finish = finish


class Counts:
    """An observer that keeps what it was told."""

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []

    def started(self, model: str) -> None:
        self.log.append(("started", model))

    def first_token(self, model: str, seconds: float) -> None:
        self.log.append(("first", model, seconds))

    def ended(self, model: str, seconds: float, finish: Finish) -> None:
        self.log.append(("ended", model, seconds, finish.reason))


class Wire:
    """A link that keeps what is sent."""

    problem = "no router"

    def __init__(self) -> None:
        self.connected = True
        self.renewals = 0
        self.sent: list[bytes] = []
        self.cancels: list[int] = []

    async def wait_connected(self, timeout_s: float) -> bool:
        return True

    def submit(self, request: bytes) -> int:
        self.sent.append(request)
        return len(self.sent) - 1

    def cancel(self, stream: int) -> None:
        self.cancels.append(stream)

    def renew(self) -> None:
        self.renewals += 1


class Stage:
    """A session with its surroundings; `now` is its clock."""

    def __init__(self, return_s: float = 10.0) -> None:
        self.now = 0.0
        self.counts, self.wire = Counts(), Wire()
        self.hooks: list[Callable[[], None]] = []
        self.session = Session(1.0, self.counts, lambda: self.now, self.hooks, return_s)
        self.session.attach(self.wire)

    def open(self, name: str, **fields: Any) -> Recorder:
        receiver = Recorder(name)
        self.session.open(receiver, GenerateRequest(model="m", **fields))
        return receiver

    def lose(self) -> None:
        self.session.on_lost("the router is gone", ALL)


def rows(stream: int, *tokens: int) -> Detail:
    """A row of log probabilities for each token."""
    values = Logprobs(width=1, token=tokens, logprob=[-0.5] * len(tokens), rank=[1] * len(tokens))
    return Detail(stream=stream, logprobs=values)


def test_one_token_each() -> None:
    stage = Stage()
    first, second = stage.open("a"), stage.open("b")
    stage.session.on_frame(Frame(stream=pack([1, 0]), token=pack([7, 8])))
    assert (first.tokens, second.tokens) == ([8], [7])


def test_a_mixed_frame_keeps_order_and_ends_after_its_tokens() -> None:
    stage = Stage()
    first, second = stage.open("a"), stage.open("b")
    detail = Detail(stream=1, logprobs=Logprobs(width=1, token=[4], logprob=[-0.5], rank=[1]))
    stage.session.on_frame(
        Frame(
            stream=pack([0, 1, 0]),
            count=pack([2, 1, 1]),
            token=pack([1, 2, 4, 3]),
            detail=[detail],
            finish=[Finish(stream=0, reason=FINISH_REASON_STOP)],
        )
    )
    assert first.tokens == [1, 2, 3]
    assert first.finish is not None
    assert second.tokens == [4]
    assert second.details == [detail]
    assert second.finish is None
    assert stage.session.running == 1


def test_a_cancelled_request_is_fed_no_more() -> None:
    stage = Stage()
    cancelled = stage.open("a")
    stage.session.cancel("a")
    stage.session.cancel("a")  # twice is once
    assert stage.wire.cancels == [0]
    second = stage.open("b")
    stage.session.on_frame(Frame(stream=pack([0]), token=pack([9])))  # a late token
    assert cancelled.tokens == []
    assert second.tokens == []
    stage.session.on_frame(Frame(finish=[Finish(stream=0, reason=FINISH_REASON_CANCELLED)]))
    assert cancelled.finish is None
    assert stage.session.running == 1


def test_cancelled_ones_count_as_running_until_they_end() -> None:
    stage = Stage()
    stage.open("a")
    stage.open("b")
    stage.session.cancel("a")
    assert stage.session.running == 2
    stage.session.on_frame(Frame(finish=[Finish(stream=0, reason=FINISH_REASON_CANCELLED)]))
    assert stage.session.running == 1


def test_without_a_wait_a_lost_router_fails_what_runs() -> None:
    stage = Stage(return_s=0.0)
    first, second = stage.open("a"), stage.open("b")
    stage.session.on_lost("the router is gone", ALL)
    for receiver in (first, second):
        assert receiver.finish is not None
        assert receiver.finish.code == 14
        assert receiver.finish.message == "the router is gone"
    assert stage.session.running == 0
    assert [entry[0] for entry in stage.counts.log].count("ended") == 2


def test_a_request_goes_on_at_the_next_router_from_the_tokens_that_it_has() -> None:
    stage = Stage()
    sampling = SamplingParams(temperature=0.0, max_tokens=9, min_tokens=3)
    receiver = stage.open("a", prompt=pack([1, 2]), sampling=sampling)
    stage.session.on_frame(Frame(stream=pack([0]), token=pack([7])))
    stage.session.on_frame(Frame(stream=pack([0]), token=pack([8])))
    stage.lose()
    assert (receiver.finish, stage.session.running) == (None, 1)
    stage.session.on_connected()
    again = GenerateRequest.FromString(stage.wire.sent[1])
    assert (again.prompt, again.resumed_tokens) == (pack([1, 2, 7, 8]), 2)
    assert (again.sampling.max_tokens, again.sampling.min_tokens) == (7, 1)
    stage.session.on_frame(
        Frame(stream=pack([1]), token=pack([9]), finish=[Finish(stream=1, reason=FINISH_REASON_STOP)])
    )
    assert receiver.tokens == [7, 8, 9]
    assert receiver.finish is not None
    assert stage.session.running == 0
    assert [entry[0] for entry in stage.counts.log] == ["started", "first", "ended"], "one request, however often lost"


def test_a_request_that_is_lost_twice_has_all_its_tokens_in_the_last_prompt() -> None:
    stage = Stage()
    receiver = stage.open("a", prompt=pack([1]), sampling=SamplingParams(temperature=0.0, max_tokens=9))
    for turn, token in enumerate((5, 6)):
        stage.session.on_frame(Frame(stream=pack([turn]), token=pack([token])))
        stage.lose()
        stage.session.on_connected()
    again = GenerateRequest.FromString(stage.wire.sent[2])
    assert (again.prompt, again.resumed_tokens, again.sampling.max_tokens) == (pack([1, 5, 6]), 2, 7)
    assert receiver.finish is None


def test_one_without_a_token_is_sent_as_it_was() -> None:
    stage = Stage()
    stage.open("a", prompt=pack([1, 2]), sampling=SamplingParams(max_tokens=4))
    stage.lose()
    stage.session.on_connected()
    assert stage.wire.sent[0] == stage.wire.sent[1]


def test_a_seeded_request_is_repeated_and_what_was_had_is_swallowed_with_its_rows() -> None:
    stage = Stage()
    receiver = stage.open("a", prompt=pack([1]), sampling=SamplingParams(seed=3, temperature=1.0, max_tokens=9))
    stage.session.on_frame(Frame(stream=pack([0]), count=pack([2]), token=pack([7, 8]), detail=[rows(0, 7, 8)]))
    stage.lose()
    stage.session.on_connected()
    assert stage.wire.sent[1] == stage.wire.sent[0]
    stage.session.on_frame(Frame(stream=pack([1]), token=pack([7]), detail=[rows(1, 7)]))
    assert receiver.tokens == [7, 8]
    stage.session.on_frame(Frame(stream=pack([1]), count=pack([2]), token=pack([8, 9]), detail=[rows(1, 8, 9)]))
    assert receiver.tokens == [7, 8, 9]
    assert [list(detail.logprobs.token) for detail in receiver.details] == [[7, 8], [9]]
    stage.session.on_frame(Frame(stream=pack([1]), token=pack([10])))
    assert receiver.tokens == [7, 8, 9, 10]


@pytest.mark.parametrize("ends", [False, True])
def test_a_seeded_request_that_comes_out_otherwise_fails(ends: bool) -> None:
    stage = Stage()
    receiver = stage.open("a", prompt=pack([1]), sampling=SamplingParams(seed=3, temperature=1.0))
    stage.session.on_frame(Frame(stream=pack([0]), count=pack([2]), token=pack([7, 8])))
    stage.lose()
    stage.session.on_connected()
    token, finish = (7, [Finish(stream=1, reason=FINISH_REASON_STOP)]) if ends else (6, [])
    stage.session.on_frame(Frame(stream=pack([1]), token=pack([token]), finish=finish))
    assert receiver.tokens == [7, 8]
    assert receiver.finish is not None
    assert "gave other tokens when repeated" in receiver.finish.message
    assert stage.wire.cancels == ([] if ends else [1]), "the fleet need not go on with it"


def test_one_that_had_every_token_ends_without_being_sent() -> None:
    stage = Stage()
    receiver = stage.open("a", prompt=pack([1]), sampling=SamplingParams(max_tokens=2))
    stage.session.on_frame(Frame(stream=pack([0]), count=pack([2]), token=pack([7, 8])))
    stage.lose()
    stage.session.on_connected()
    assert len(stage.wire.sent) == 1
    assert receiver.finish is not None
    assert (receiver.finish.reason, receiver.finish.generated_tokens) == (FINISH_REASON_LENGTH, 2)


def test_its_deadline_goes_on_while_it_waits() -> None:
    stage = Stage()
    first = stage.open("a", prompt=pack([1]), timeout_ms=5000)
    second = stage.open("b", prompt=pack([1]), timeout_ms=1000)
    stage.lose()
    stage.now = 2.0
    stage.session.on_connected()
    assert [GenerateRequest.FromString(raw).timeout_ms for raw in stage.wire.sent] == [5000, 1000, 3000]
    assert first.finish is None
    assert second.finish is not None
    assert second.finish.code == 4


def test_a_router_that_stays_away_fails_what_waits_for_it() -> None:
    stage = Stage()
    receiver = stage.open("a")
    stage.lose()
    stage.now = 9.9
    stage.session.give_up()
    assert receiver.finish is None
    stage.now = 10.0
    stage.session.give_up()
    assert receiver.finish is not None
    assert (receiver.finish.code, receiver.finish.message) == (14, "no router")
    assert stage.session.running == 0


def test_a_client_that_leaves_while_it_waits_is_sent_nowhere() -> None:
    stage = Stage()
    stage.open("a")
    stage.lose()
    stage.session.cancel("a")
    stage.session.on_connected()
    assert (len(stage.wire.sent), stage.wire.cancels, stage.session.running) == (1, [], 0)
    assert stage.counts.log[-1][3] == FINISH_REASON_CANCELLED


@pytest.mark.parametrize("why", ["forbidden", "rows"])
def test_what_may_or_can_not_go_on_fails_at_once(why: str) -> None:
    stage = Stage()
    receiver = stage.open("a", prompt=pack([1]), resume=RESUME_OFF if why == "forbidden" else RESUME_ON)
    if why == "rows":  # of a long prompt, ahead of the first token: the next router would send them again
        stage.session.on_frame(Frame(detail=[Detail(stream=0, prompt_logprobs=Logprobs(width=1, token=[1]))]))
    stage.lose()
    assert receiver.finish is not None
    assert receiver.finish.code == 14


def test_a_request_under_which_session_after_session_is_lost_fails() -> None:
    stage = Stage()
    receiver = stage.open("a")
    for _ in range(5):
        stage.lose()
        stage.session.on_connected()
        assert receiver.finish is None
    stage.lose()
    assert receiver.finish is not None


def test_what_waits_when_the_edge_shuts_down_hears_of_that() -> None:
    stage = Stage()
    receiver = stage.open("a")
    stage.lose()
    stage.session.close()
    assert receiver.finish is not None
    assert receiver.finish.message.startswith("this edge is shutting down")
    assert stage.session.running == 0


def test_the_end_of_a_session_that_was_left_touches_no_stream_of_the_next() -> None:
    stage = Stage()
    old, new = stage.open("a"), stage.open("b")
    stage.session.on_lost("gone", range(1))
    stage.session.on_connected()
    assert len(stage.wire.sent) == 3
    stage.session.on_frame(Frame(stream=pack([1, 2]), token=pack([5, 6])))
    assert (old.tokens, new.tokens) == ([6], [5])


def test_a_request_that_a_draining_router_refuses_waits_for_the_next_session() -> None:
    stage = Stage()
    receiver = stage.open("a")
    refusal = Finish(stream=0, reason=FINISH_REASON_ERROR, code=14, draining=True)
    stage.session.on_frame(Frame(finish=[refusal]))
    assert (stage.wire.renewals, receiver.finish, stage.session.running) == (1, None, 1)
    stage.session.on_connected()
    stage.session.on_frame(Frame(stream=pack([1]), token=pack([5])))
    assert receiver.tokens == [5]


def test_hooks_run_once_a_frame() -> None:
    stage = Stage()
    calls: list[int] = []
    stage.hooks.append(lambda: calls.append(1))
    stage.open("a")
    stage.session.on_frame(Frame(stream=pack([0]), token=pack([1])))
    stage.session.on_frame(Frame(stream=pack([0, 0]), token=pack([2, 3])))
    assert len(calls) == 2


def test_unknown_streams_are_ignored() -> None:
    stage = Stage()
    receiver = stage.open("a")
    stage.session.on_frame(Frame(stream=pack([5]), token=pack([1]), finish=[Finish(stream=6)]))
    assert receiver.tokens == []
    assert stage.session.running == 1


def test_a_malformed_frame_raises() -> None:
    stage = Stage()
    with pytest.raises(MalformedFrame):
        stage.session.on_frame(Frame(stream=pack([1, 2]), token=pack([1])))


def test_times_are_observed_once() -> None:
    stage = Stage()
    stage.open("a")
    stage.now = 0.5
    stage.session.on_frame(Frame(stream=pack([0]), token=pack([1])))
    stage.session.on_frame(Frame(stream=pack([0]), token=pack([1])))
    stage.now = 2.0
    stage.session.on_frame(Frame(finish=[Finish(stream=0, reason=FINISH_REASON_STOP)]))
    assert stage.counts.log == [("started", "m"), ("first", "m", 0.5), ("ended", "m", 2.0, FINISH_REASON_STOP)]
