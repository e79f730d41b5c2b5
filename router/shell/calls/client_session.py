"""Serves Session to clients: one SessionSink per call, one reader, one writer.

The writer sends at once when nothing was sent in the last moment, and gathers otherwise: several worker frames become
one message per session under load, one step is one message when there is time.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError

from megatoken.errors import MegatokenError, RequestError
from megatoken.router.config import RouterConfig
from megatoken.router.core.ending import error_finish
from megatoken.router.core.request import Request
from megatoken.router.core.sink import SessionSink
from megatoken.router.core.state import RouterState
from megatoken.router.core.submission import cancel, submit
from megatoken.router.identity.callers import Caller
from megatoken.router.secure import EOF
from megatoken.tokens import wire
from megatoken.tokens.fields import fields_at_most
from megatoken.tokens.frames import MalformedFrame, column
from megatoken.v1.frame_columns_pb2 import ClientFrame, Start

REQUESTS_AT_ONCE: Final = 64  # taken on, or given up, before the other callers have their turn; some 70 us each
CANCELS_AT_ONCE: Final = 4096  # the same; a message holds millions of numbers, and most cost but a look, some 0.2 us
MAX_REFUSALS: Final = 8192  # that wait for the client; with more it is not read from. Some 128 bytes each
_URGENT_S = 0.001  # least time between messages when one holds a first token or an end


class ClientSession(SessionSink):
    """One Session call."""

    def __init__(self, state: RouterState, config: RouterConfig, caller: Caller) -> None:
        super().__init__()
        self._state = state
        self._config = config
        self._caller = caller
        self._something = asyncio.Event()
        self._urgent = asyncio.Event()
        self._caught_up = asyncio.Event()  # the client has read what it was refused
        self._closing = False

    def wake(self) -> None:
        self._something.set()
        if self.outbox.urgent:
            self._urgent.set()

    async def serve(self, context: Any) -> None:
        # The caller may write: one who writes to a refused call hears no reason.
        await context.send_initial_metadata((wire.SESSION_TAKEN,))
        self._state.add_sink(self)
        writer = asyncio.create_task(self._write(context))
        reader = asyncio.create_task(self._read(context))
        try:
            done, _ = await asyncio.wait((reader, writer), return_when=asyncio.FIRST_COMPLETED)
            if reader in done and reader.exception() is None and not writer.done():
                self._closing = True  # the client's half is closed: running requests end, then the call does
                self._something.set()
                await writer
            for task in done:
                task.result()
        except MalformedFrame as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"frame: {error}")
        except TimeoutError:
            await context.abort(
                grpc.StatusCode.ABORTED, f"the client read nothing for {self._config.limits.client_stall_s:.0f} s"
            )
        finally:
            reader.cancel()
            writer.cancel()
            await asyncio.shield(self.abandon())  # to its end, even if the process stops meanwhile

    async def abandon(self) -> None:
        """The call is over: what still runs is cancelled, without a word to the client."""
        if self.index < 0:
            return
        for position, request in enumerate(list(self.requests.values()), start=1):
            cancel(self._state, request, time.monotonic())
            if position % REQUESTS_AT_ONCE == 0:
                await asyncio.sleep(0)
        self._state.remove_sink(self)
        self.outbox.clear()

    async def _read(self, context: Any) -> None:
        while True:
            raw = await context.read()
            if raw is EOF:
                return
            now = time.monotonic()
            most = self._config.limits.max_streams_per_session
            if not await fields_at_most(raw, most + 1):  # before a decoder makes an object of each; cancels are one
                raise MalformedFrame(f"{len(raw)} bytes with more than is allowed: at most {most} requests a message")
            try:
                frame = ClientFrame.FromString(raw)
            except DecodeError:
                raise MalformedFrame(f"{len(raw)} bytes that are not a ClientFrame") from None
            large = len(raw) > self._config.limits.max_request_bytes
            taken = 0
            for start in frame.start:
                self._start(start, now, start.request.ByteSize() if large else 0)
                taken += max(1, start.request.sampling.n)
                if taken >= REQUESTS_AT_ONCE:
                    taken = 0
                    await self._give_way()
            cancelled = column(frame.cancel)
            for first in range(0, len(cancelled), CANCELS_AT_ONCE):
                if first:
                    await self._give_way()
                for stream in cancelled[first : first + CANCELS_AT_ONCE].tolist():
                    request = self.requests.get(stream)
                    if request is not None:
                        cancel(self._state, request, now)
            if self.outbox.refusals > MAX_REFUSALS:
                await self._give_way()

    async def _give_way(self) -> None:
        """Lets the loop go on, and a client that reads no answers wait: its writer cuts it off when it never does."""
        await asyncio.sleep(0)
        while self.outbox.refusals > MAX_REFUSALS:
            self._caught_up.clear()
            await self._caught_up.wait()

    def _start(self, start: Start, now: float, size_bytes: int) -> None:
        message = start.request
        choices = max(1, message.sampling.n)
        limits = self._config.limits
        try:
            if size_bytes > limits.max_request_bytes:
                raise wire.too_large(size_bytes, limits.max_request_bytes)
            if choices > limits.max_n:
                choices, asked = 1, choices  # it has no further numbers that an answer could be for
                raise RequestError("sampling.n", asked, f"1 to {limits.max_n}")
            taken = range(start.stream, start.stream + choices)
            if len(self.requests) + len(taken) > limits.max_streams_per_session:
                bound = limits.max_streams_per_session
                raise RequestError("stream", start.stream, f"at most {bound} at once in a session")
            if any(stream in self.requests for stream in taken) or taken[-1] >= 1 << 32:
                raise RequestError("stream", start.stream, "numbers that no running request has, below 2**32")
            deadline_s = now + message.timeout_ms / 1000 if message.timeout_ms else float("inf")
            submit(self._state, self, self.index, start.stream, message, self._caller, deadline_s, now, self.own)
        except MegatokenError as error:
            self._state.count_refusal(message.model, error)
            self.refuse(start.stream, choices, error)

    def own(self, requests: list[Request]) -> None:
        for request in requests:
            self.requests[request.stream] = request

    def refuse(self, stream: int, choices: int, error: MegatokenError) -> None:
        """Ends each number that the request could have had. Its text is encoded once for all of them."""
        encoded = error_finish(0, error).SerializeToString()
        numbers = (number for number in range(stream, min(stream + choices, 1 << 32)) if number not in self.requests)
        self.outbox.add_refusals([wire.finish_of(number, encoded) for number in numbers])
        self.wake()

    async def _write(self, context: Any) -> None:
        flush_s = self._config.delivery.flush_ms / 1000
        stall_s = self._config.limits.client_stall_s
        outbox = self.outbox
        sent_at = 0.0
        while True:
            if not outbox:
                if (self._closing or self._state.draining) and not self.requests:
                    return
                self._something.clear()
                await self._something.wait()
                continue
            wait_s = sent_at + (_URGENT_S if outbox.urgent else flush_s) - time.monotonic()
            if wait_s > 0:
                await self._pause(wait_s, urgent=outbox.urgent)
                continue
            sent_at = time.monotonic()
            async with asyncio.timeout(stall_s):  # wait_for may lose a cancel, and the session would never end
                await context.write(outbox.take())
            if not outbox.refusals:
                self._caught_up.set()

    async def _pause(self, wait_s: float, *, urgent: bool) -> None:
        """Waits, but no longer than until a first token comes."""
        if urgent:
            await asyncio.sleep(wait_s)
            return
        self._urgent.clear()
        try:
            async with asyncio.timeout(wait_s):
                await self._urgent.wait()
        except TimeoutError:
            pass
