"""Hands the frames of the router to the requests they are for, once per frame.

All models of an edge share its sessions. A receiver is one request of vLLM's layer (vllm/engine_core). After each frame
the `after_frame` hooks run, so that a model's engine core gives vLLM one batch of outputs per frame.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Protocol

from megatoken.errors import UnavailableError
from megatoken.router.edge.router_session.streams import Streams
from megatoken.tokens.frames import token_columns
from megatoken.v1.frame_columns_pb2 import Frame, GenerateRequest
from megatoken.v1.tokens_pb2 import FINISH_REASON_ERROR, Detail, Finish

UNAVAILABLE = 14  # gRPC status number


class Receiver(Protocol):
    """One running request. Calls come in order; the one with a finish is the last."""

    request_id: str

    def feed(self, tokens: list[int], details: list[Detail] | None, finish: Finish | None) -> None:
        """Takes new tokens, what belongs to them, and the end. Must not raise and must not block."""


class Observer(Protocol):
    """Counts requests; metrics.EdgeMetrics is one."""

    def started(self, model: str) -> None: ...
    def first_token(self, model: str, seconds: float) -> None: ...
    def ended(self, model: str, seconds: float, finish: Finish) -> None: ...


class LinkToRouter(Protocol):
    """The way to the router; link.RouterLink is one."""

    problem: str

    @property
    def connected(self) -> bool: ...
    async def wait_connected(self, timeout_s: float) -> bool: ...
    def submit(self, request: bytes) -> int: ...
    def cancel(self, stream: int) -> None: ...


class Session:
    """Opens and cancels requests, and feeds their receivers. `clock` counts monotonic seconds."""

    def __init__(
        self,
        connect_timeout_s: float,
        observer: Observer,
        clock: Callable[[], float],
        after_frame: list[Callable[[], None]],
    ) -> None:
        self.streams: Streams[Receiver] = Streams()
        self._after_frame = after_frame
        self._connect_timeout_s = connect_timeout_s
        self._observer = observer
        self._clock = clock
        self._link: LinkToRouter | None = None
        self._opened: dict[int, tuple[str, float]] = {}  # model and time of departure, by stream
        self._silent: set[int] = set()  # streams without a first token

    def attach(self, link: LinkToRouter) -> None:
        """Gives the session its link; before any request."""
        self._link = link

    @property
    def connected(self) -> bool:
        return self._link is not None and self._link.connected

    @property
    def running(self) -> int:
        """Requests at the router, cancelled ones whose Finish has not come included."""
        return len(self.streams)

    async def wait_connected(self) -> None:
        """Waits for the router. Raises UnavailableError when it does not answer in time."""
        if self._link is None or not await self._link.wait_connected(self._connect_timeout_s):
            raise UnavailableError(self._link.problem if self._link else "the edge is not connected to a router")

    def open(self, receiver: Receiver, request: GenerateRequest) -> None:
        """Sends a request. Raises UnavailableError without a router, RequestError for one that is too large for it."""
        if self._link is None:
            raise UnavailableError("the edge is not connected to a router")
        number = self._link.submit(request.SerializeToString())
        self.streams.add(number, receiver.request_id, receiver)
        self._opened[number] = (request.model, self._clock())
        self._silent.add(number)
        self._observer.started(request.model)

    def cancel(self, request_id: str) -> None:
        """Aborts a request; its receiver is fed no more. Unknown ids are ignored: the request ended already."""
        number = self.streams.cancel(request_id)
        if number is not None and self._link is not None:
            self._link.cancel(number)

    def on_frame(self, frame: Frame) -> None:
        """Feeds every request that a frame has something for. Raises MalformedFrame."""
        stream, count, token = token_columns(frame)
        numbers = stream.tolist()
        if self._silent:
            self._note_first_tokens(numbers)
        by_stream = self.streams.by_stream
        if count is None and not frame.detail and not frame.finish:
            for number, value in zip(numbers, token.tolist(), strict=True):
                receiver = by_stream.get(number)
                if receiver is not None:
                    receiver.feed([value], None, None)
        else:
            self._feed_mixed(frame, numbers, None if count is None else count.tolist(), token.tolist())
        for hook in self._after_frame:
            hook()

    def _feed_mixed(self, frame: Frame, stream: list[int], count: list[int] | None, token: list[int]) -> None:
        tokens: dict[int, list[int]] = defaultdict(list)
        at = 0
        for position, number in enumerate(stream):
            size = 1 if count is None else count[position]
            tokens[number].extend(token[at : at + size])
            at += size
        details: dict[int, list[Detail]] = defaultdict(list)
        for detail in frame.detail:
            details[detail.stream].append(detail)
            tokens[detail.stream]  # a detail may come before its request's first token
        finishes = {finish.stream: finish for finish in frame.finish}
        for number in finishes:
            tokens[number]
        for number, values in tokens.items():
            finish = finishes.get(number)
            receiver = self.streams.by_stream.get(number)
            if finish is not None:
                self._note_end(number, finish)
                self.streams.finish(number, None if receiver is None else receiver.request_id)
            if receiver is not None:
                receiver.feed(values, details.get(number), finish)

    def on_lost(self, problem: str) -> None:
        """The link broke: every running request fails with UNAVAILABLE."""
        finish = Finish(reason=FINISH_REASON_ERROR, code=UNAVAILABLE, message=problem)
        for number in list(self._opened):
            self._note_end(number, finish)
        for receiver in self.streams.lose_all():
            receiver.feed([], None, finish)
        for hook in self._after_frame:
            hook()

    def _note_first_tokens(self, numbers: list[int]) -> None:
        now = self._clock()
        for number in self._silent.intersection(numbers):
            self._silent.discard(number)
            model, began = self._opened[number]
            self._observer.first_token(model, now - began)

    def _note_end(self, number: int, finish: Finish) -> None:
        opened = self._opened.pop(number, None)
        self._silent.discard(number)
        if opened is not None:
            model, began = opened
            self._observer.ended(model, self._clock() - began, finish)
