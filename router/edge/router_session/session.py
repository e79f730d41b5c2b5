"""Hands the frames of the router to the requests they are for, once per frame, and carries them over its loss.

All models of an edge share its sessions. A receiver is one request of vLLM's layer (vllm/engine_core). After each frame
the `after_frame` hooks run, so that a model's engine core gives vLLM one batch of outputs per frame.

When the router is lost, requests wait for it or its successor, and go on from the tokens that their receivers have
(megatoken.tokens.continuation). A router that drains takes no new request: such a one waits for the next session too.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from typing import Protocol

from megatoken.errors import MegatokenError, UnavailableError
from megatoken.router.edge.router_session.streams import Streams
from megatoken.tokens.continuation import drop_rows, needs_replay, prefix_request
from megatoken.tokens.frames import token_columns
from megatoken.v1.frame_columns_pb2 import Frame, GenerateRequest
from megatoken.v1.tokens_pb2 import (
    FINISH_REASON_CANCELLED,
    FINISH_REASON_ERROR,
    FINISH_REASON_LENGTH,
    RESUME_OFF,
    Detail,
    Finish,
)

MOST_LOSSES = 5  # of one request
SHUTTING_DOWN = "this edge is shutting down; another one, or this one later, takes the request"
DEADLINE_EXCEEDED, UNAVAILABLE = 4, 14  # gRPC status numbers


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
    """The way to the router; link.RouterLink is one. No two requests get one number, whatever session they are of."""

    problem: str

    @property
    def connected(self) -> bool: ...
    async def wait_connected(self, timeout_s: float) -> bool: ...
    def submit(self, request: bytes) -> int: ...
    def cancel(self, stream: int) -> None: ...
    def renew(self) -> None: ...


@dataclass(slots=True)
class OpenRequest:
    """What is kept of a request from its departure to its end."""

    receiver: Receiver
    model: str
    began_s: float
    request: bytes
    """As it was sent first."""
    had: array[int] = field(default_factory=lambda: array("I"))
    """Tokens that the receiver was fed."""
    again: int = 0
    """Of `had`, how many the router is still to send once more: a replay."""
    rows_ahead: bool = False
    """Log probabilities of the prompt came before the first token; what goes on would bring them again."""
    losses: int = 0
    """Sessions that were lost under it: it might be what breaks them."""
    waits_since_s: float = 0.0


class Session:
    """Opens and cancels requests, and feeds their receivers. `clock` counts monotonic seconds."""

    def __init__(
        self,
        connect_timeout_s: float,
        observer: Observer,
        clock: Callable[[], float],
        after_frame: list[Callable[[], None]],
        return_s: float = 0.0,
    ) -> None:
        """`return_s`: how long a request waits for a lost router."""
        self.streams: Streams[Receiver] = Streams()
        self._after_frame = after_frame
        self._connect_timeout_s = connect_timeout_s
        self._return_s = return_s
        self._observer = observer
        self._clock = clock
        self._link: LinkToRouter | None = None
        self._opened: dict[int, OpenRequest] = {}  # by stream
        self._silent: set[int] = set()  # streams without a first token
        self._replaying: set[int] = set()  # streams that send again what was had
        self._waiting: dict[str, OpenRequest] = {}  # without a router, by request

    def attach(self, link: LinkToRouter) -> None:
        """Gives the session its link; before any request."""
        self._link = link

    @property
    def connected(self) -> bool:
        return self._link is not None and self._link.connected

    @property
    def running(self) -> int:
        """Requests at the router, cancelled ones whose Finish has not come and those that wait for it included."""
        return len(self.streams) + len(self._waiting)

    async def wait_connected(self) -> None:
        """Waits for the router. Raises UnavailableError when it does not answer in time."""
        if self._link is None or not await self._link.wait_connected(self._connect_timeout_s):
            raise UnavailableError(self._link.problem if self._link else "the edge is not connected to a router")

    def open(self, receiver: Receiver, request: GenerateRequest) -> None:
        """Sends a request. Raises UnavailableError without a router, RequestError for one that is too large for it."""
        if self._link is None:
            raise UnavailableError("the edge is not connected to a router")
        raw = request.SerializeToString()
        number = self._link.submit(raw)
        self._enter(number, OpenRequest(receiver, request.model, self._clock(), raw))
        self._silent.add(number)
        self._observer.started(request.model)

    def _enter(self, number: int, running: OpenRequest) -> None:
        self.streams.add(number, running.receiver.request_id, running.receiver)
        self._opened[number] = running

    def cancel(self, request_id: str) -> None:
        """Aborts a request; its receiver is fed no more. Unknown ids are ignored: the request ended already."""
        waiting = self._waiting.pop(request_id, None)
        if waiting is not None:
            self._ended(waiting, Finish(reason=FINISH_REASON_CANCELLED))
        number = self.streams.cancel(request_id)
        if number is not None and self._link is not None:
            self._link.cancel(number)

    def on_frame(self, frame: Frame) -> None:
        """Feeds every request that a frame has something for. Raises MalformedFrame."""
        stream, count, token = token_columns(frame)
        numbers = stream.tolist()
        if self._silent:
            self._note_first_tokens(numbers)
        opened, by_stream = self._opened, self.streams.by_stream
        if count is None and not frame.detail and not frame.finish and not self._replaying:
            for number, value in zip(numbers, token.tolist(), strict=True):
                receiver = by_stream.get(number)
                if receiver is not None:
                    opened[number].had.append(value)
                    receiver.feed([value], None, None)
        else:
            self._feed_mixed(frame, numbers, None if count is None else count.tolist(), token.tolist())
        self._flush()

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
            self._feed_one(number, values, details.get(number), finishes.get(number))

    def _feed_one(self, number: int, values: list[int], details: list[Detail] | None, finish: Finish | None) -> None:
        receiver = self.streams.by_stream.get(number)
        running = self._opened.get(number)
        if receiver is None or running is None:  # cancelled
            if finish is not None:
                self._note_end(number, finish)
                self.streams.finish(number, None)
            return
        if number in self._replaying:
            values, details, finish = self._not_had(number, running, values, details, finish)
            if not values and details is None and finish is None:
                return
        if finish is not None and finish.draining and not values and not running.had:
            self._wait(number, running)
            if self._link is not None:
                self._link.renew()
            return
        if finish is not None:
            self._note_end(number, finish)
            self.streams.finish(number, receiver.request_id)
        running.had.extend(values)
        running.rows_ahead = running.rows_ahead or bool(details and not running.had)
        receiver.feed(values, details, finish)

    def _not_had(
        self, number: int, running: OpenRequest, values: list[int], details: list[Detail] | None, finish: Finish | None
    ) -> tuple[list[int], list[Detail] | None, Finish | None]:
        """Of what a replay brings, what the receiver was not fed before."""
        at = len(running.had) - running.again
        old = min(running.again, len(values))
        if running.had[at : at + old].tolist() != values[:old] or (finish is not None and old < running.again):
            self._replaying.discard(number)
            self._cancel_quietly(number, finish)
            return [], None, error_finish("the router was lost, and the seeded request gave other tokens when repeated")
        running.again -= old
        left = old
        for detail in details or ():
            rows = min(left, len(detail.logprobs.rank))
            drop_rows(detail, rows)
            left -= rows
        if not running.again:
            self._replaying.discard(number)
        return values[old:], [detail for detail in details or () if detail.logprobs.rank] or None, finish

    def _cancel_quietly(self, number: int, finish: Finish | None) -> None:
        if finish is None and self._link is not None:
            self._link.cancel(number)

    def _wait(self, number: int, running: OpenRequest) -> None:
        """Takes a request out of the session, to be sent again in the next one."""
        self._opened.pop(number)
        self.streams.finish(number, running.receiver.request_id)
        self._silent.discard(number)
        self._replaying.discard(number)
        running.waits_since_s = self._clock()
        self._waiting[running.receiver.request_id] = running

    def on_connected(self) -> None:
        """The link has a session: what waits for it goes on."""
        for request_id, running in list(self._waiting.items()):
            if self._link is None or not self._link.connected:
                return
            raw, complete = self._rest_of(running)
            if complete is not None:
                del self._waiting[request_id]
                self._feed_end(running, complete)
                continue
            try:
                number = self._link.submit(raw)
            except UnavailableError:
                return
            except MegatokenError as error:  # with its tokens it is larger than a router takes
                del self._waiting[request_id]
                self._feed_end(running, error_finish(str(error)))
                continue
            del self._waiting[request_id]
            self._enter(number, running)
            if running.again:
                self._replaying.add(number)
            if not running.had:
                self._silent.add(number)
        self._flush()

    def _rest_of(self, running: OpenRequest) -> tuple[bytes, Finish | None]:
        """What to send for the rest of a request, or how it ends without another token."""
        request = GenerateRequest.FromString(running.request)
        if request.timeout_ms:
            left_ms = request.timeout_ms - round((self._clock() - running.began_s) * 1000)
            if left_ms <= 0:
                return b"", error_finish("the request's time is over", DEADLINE_EXCEEDED)
            request.timeout_ms = left_ms
        had = len(running.had)
        if request.sampling.HasField("max_tokens") and 0 < request.sampling.max_tokens <= had:
            return b"", Finish(reason=FINISH_REASON_LENGTH, generated_tokens=had)
        raw = request.SerializeToString()
        if not had:
            return raw, None
        if needs_replay(request.sampling):
            running.again = had
            return raw, None
        return prefix_request(raw, running.had.tobytes()), None

    def on_lost(self, problem: str, streams: Container[int]) -> None:
        """A session of the link broke, with what ran of these streams.

        Its requests wait for the next one; those that cannot go on fail with UNAVAILABLE.
        """
        gone = error_finish(problem)
        for number, running in list(self._opened.items()):
            if number not in streams:
                continue
            if number not in self.streams.by_stream:
                self._note_end(number, gone)
                self.streams.finish(number, None)
            elif self._may_go_on(running):
                running.losses += 1
                self._wait(number, running)
            else:
                self._note_end(number, gone)
                self.streams.finish(number, running.receiver.request_id)
                running.receiver.feed([], None, gone)
        self._flush()

    def _may_go_on(self, running: OpenRequest) -> bool:
        if not self._return_s or running.rows_ahead or running.losses >= MOST_LOSSES:
            return False
        return GenerateRequest.FromString(running.request).resume != RESUME_OFF

    def give_up(self) -> None:
        """Ends what has waited for a router long enough. Called about once a second."""
        now = self._clock()
        problem = self._link.problem if self._link is not None else "the edge is not connected to a router"
        for request_id, running in list(self._waiting.items()):
            if now - running.waits_since_s >= self._return_s:
                del self._waiting[request_id]
                self._feed_end(running, error_finish(problem))
        self._flush()

    def close(self) -> None:
        """Ends all that waits for a router, once the link is closed."""
        for running in self._waiting.values():
            self._feed_end(running, error_finish(SHUTTING_DOWN))
        self._waiting.clear()
        self._flush()

    def _flush(self) -> None:
        for hook in self._after_frame:
            hook()

    def _feed_end(self, running: OpenRequest, finish: Finish) -> None:
        self._ended(running, finish)
        running.receiver.feed([], None, finish)

    def _note_first_tokens(self, numbers: list[int]) -> None:
        now = self._clock()
        for number in self._silent.intersection(numbers):
            self._silent.discard(number)
            running = self._opened[number]
            self._observer.first_token(running.model, now - running.began_s)

    def _note_end(self, number: int, finish: Finish) -> None:
        running = self._opened.pop(number, None)
        self._silent.discard(number)
        self._replaying.discard(number)
        if running is not None:
            self._ended(running, finish)

    def _ended(self, running: OpenRequest, finish: Finish) -> None:
        self._observer.ended(running.model, self._clock() - running.began_s, finish)


def error_finish(problem: str, code: int = UNAVAILABLE) -> Finish:
    """The end of a request that failed on this side of the router."""
    return Finish(reason=FINISH_REASON_ERROR, code=code, message=problem)
