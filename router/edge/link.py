"""The edge's one session with its router: starts and cancels out, whole frames in.

What many requests hand in during one turn of the event loop goes out as one ClientFrame. A lost session is opened
again; `on_lost` is told, since its requests are gone. Knows streams by number only. Called by session.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Any, Final

import grpc
import grpc.aio

from megatoken.frames import MalformedFrame, pack
from megatoken.tls import ClientTls, open_channel
from megatoken.v1.frame_columns_pb2 import ClientFrame, Frame, GenerateRequest

SESSION: Final = "/megatoken.v1.Tokens/Session"
RECONNECT_FIRST_S: Final = 0.1
RECONNECT_MAX_S: Final = 2.0
STABLE_S: Final = 5.0  # a session that lasted this long starts the reconnect pauses afresh
MAX_FRAME_PROMPT_BYTES: Final = 2 << 20  # prompts put together in one ClientFrame; a longer one goes alone
CHANNEL_OPTIONS: Final[tuple[tuple[str, object], ...]] = (
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", 64 << 20),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)
logger = logging.getLogger(__name__)


class RouterLink:
    """`on_frame` and `on_lost` are called in the event loop that `start` ran in, and must not block."""

    def __init__(
        self,
        address: str,
        on_frame: Callable[[Frame], None],
        on_lost: Callable[[str], None],
        tls: ClientTls | None = None,
        key: str | None = None,
    ) -> None:
        self.address = address
        self._on_frame = on_frame
        self._on_lost = on_lost
        self._tls = tls
        self._metadata = (("authorization", f"Bearer {key}"),) if key else None
        self._starts: list[tuple[int, GenerateRequest]] = []
        self._cancels: list[int] = []
        self._wake = asyncio.Event()
        self._connected = asyncio.Event()
        self._closing = False
        self._channel: grpc.aio.Channel | None = None
        self._task: asyncio.Task[None] | None = None
        self.problem = f"the router at {address} does not answer"

    @property
    def connected(self) -> bool:
        """Whether requests can be sent now."""
        return self._connected.is_set()

    def start(self) -> None:
        """Begins to connect. Call in the event loop."""
        self._channel = open_channel(self.address, self._tls, list(CHANNEL_OPTIONS))
        self._task = asyncio.create_task(self._keep_connected(self._channel), name="edge-router-link")

    async def wait_connected(self, timeout_s: float) -> bool:
        """Waits for a session; False when there is none in time."""
        if self._connected.is_set():
            return True
        try:
            await asyncio.wait_for(self._connected.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    def send_start(self, stream: int, request: GenerateRequest) -> None:
        """Queues a request; it goes out at the end of this turn of the loop."""
        self._starts.append((stream, request))
        self._wake.set()

    def send_cancel(self, stream: int) -> None:
        """Queues a cancel. The stream still ends with a Finish."""
        self._cancels.append(stream)
        self._wake.set()

    async def close(self) -> None:
        """Ends the session and waits for it."""
        self._closing = True
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        if self._channel is not None:
            await self._channel.close(grace=None)

    async def _keep_connected(self, channel: grpc.aio.Channel) -> None:
        pause_s = RECONNECT_FIRST_S
        loop = asyncio.get_running_loop()
        while not self._closing:
            began = loop.time()
            try:
                await asyncio.wait_for(channel.channel_ready(), RECONNECT_MAX_S)
                await self._run_session(channel)
                self.problem = f"the router at {self.address} closed the session"
            except TimeoutError:
                self.problem = f"the router at {self.address} does not answer"
            except grpc.aio.AioRpcError as error:
                self.problem = f"the router at {self.address} ended the session: {error.code().name}: {error.details()}"
            except MalformedFrame as error:
                self.problem = f"the router at {self.address} sent a malformed frame: {error}"
            self._forget(self.problem)
            pause_s = RECONNECT_FIRST_S if loop.time() - began > STABLE_S else min(pause_s * 2, RECONNECT_MAX_S)
            await asyncio.sleep(pause_s)

    def _forget(self, problem: str) -> None:
        was_connected = self._connected.is_set()
        self._connected.clear()
        self._starts.clear()
        self._cancels.clear()
        if was_connected:
            logger.warning("%s", problem)
            self._on_lost(problem)

    async def _run_session(self, channel: grpc.aio.Channel) -> None:
        session: Any = channel.stream_stream(SESSION, None, Frame.FromString)
        call = session(metadata=self._metadata)  # no iterator of requests: the writer below can be ended with the call
        writer = asyncio.create_task(self._write(call), name="edge-router-writer")
        self._connected.set()
        try:
            while True:
                frame = await call.read()
                if not isinstance(frame, Frame):  # the end of the stream
                    return
                self._on_frame(frame)
        finally:
            call.cancel()
            writer.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await writer

    async def _write(self, call: Any) -> None:
        with contextlib.suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):  # the reader sees why
            while True:
                await self._wake.wait()
                self._wake.clear()
                while self._starts or self._cancels:
                    await call.write(self._take())

    def _take(self) -> bytes:
        """One encoded ClientFrame of what is queued, cancels after the starts they may be for."""
        frame = ClientFrame()
        size = taken = 0
        for stream, request in self._starts:
            size += len(request.prompt)
            if taken and size > MAX_FRAME_PROMPT_BYTES:
                break
            frame.start.add(stream=stream, request=request)
            taken += 1
        del self._starts[:taken]
        if not self._starts and self._cancels:
            frame.cancel = pack(self._cancels)
            self._cancels.clear()
        return frame.SerializeToString()
