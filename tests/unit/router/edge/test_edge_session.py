"""Frames to receivers: order, mixed frames, cancelled numbers, a lost link."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from megatoken.router.edge.router_session.session import Session
from megatoken.tokens.frames import MalformedFrame, pack
from megatoken.v1.frame_columns_pb2 import Frame, GenerateRequest
from megatoken.v1.tokens_pb2 import FINISH_REASON_CANCELLED, FINISH_REASON_STOP, Detail, Finish, Logprobs


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
    connected = True

    def __init__(self) -> None:
        self.starts = 0
        self.cancels: list[int] = []

    async def wait_connected(self, timeout_s: float) -> bool:
        return True

    def submit(self, request: bytes) -> int:
        self.starts += 1
        return self.starts - 1

    def cancel(self, stream: int) -> None:
        self.cancels.append(stream)


class Stage:
    """A session with its surroundings; `now` is its clock."""

    def __init__(self) -> None:
        self.now = 0.0
        self.counts, self.wire = Counts(), Wire()
        self.hooks: list[Callable[[], None]] = []
        self.session = Session(1.0, self.counts, lambda: self.now, self.hooks)
        self.session.attach(self.wire)

    def open(self, name: str) -> Recorder:
        receiver = Recorder(name)
        self.session.open(receiver, GenerateRequest(model="m"))
        return receiver


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


def test_a_lost_link_fails_what_runs() -> None:
    stage = Stage()
    first, second = stage.open("a"), stage.open("b")
    stage.session.on_lost("the router is gone")
    for receiver in (first, second):
        assert receiver.finish is not None
        assert receiver.finish.code == 14
        assert receiver.finish.message == "the router is gone"
    assert stage.session.running == 0
    assert [entry[0] for entry in stage.counts.log].count("ended") == 2


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
