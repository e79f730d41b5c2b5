"""SessionClient: one Session call, in encoded frames; starts and cancels go out in as few messages as fit.

Used by the router towards workers (shell/worker_link) and by everybody towards routers (columns). Starts and cancels
that come while a write is under way go out together in the next message.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from typing import Any, Final, cast

from grpc import aio

from megatoken.router.secure import EOF
from megatoken.tokens import wire

MAX_BATCH_BYTES: Final = 1 << 20  # of starts in one ClientFrame; a single larger one goes alone
SESSION: Final = "/megatoken.v1.Tokens/Session"


class SessionClient:
    """`begin` or `begin_taken`; then `start` and `cancel` as often as you like, `read` in one task, `end`."""

    def __init__(self, channel: aio.Channel, metadata: tuple[tuple[str, str], ...] = ()) -> None:
        self._call: Any = cast(Any, channel).stream_stream(SESSION)(metadata=metadata)
        self._starts: list[bytes] = []
        self._cancels: list[int] = []
        self._something = asyncio.Event()
        self._writer: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Sends from now on."""
        self._writer = asyncio.create_task(self._write())

    async def begin_taken(self, timeout_s: float) -> bool:
        """Sends once the other side has taken the call or refused it, or `timeout_s` has passed.

        False: it was refused, and none of its requests will be seen. A write to a call that is just being refused makes
        gRPC forget why. A server of another kind may say nothing until it has something to say.
        """
        taken = True
        with contextlib.suppress(TimeoutError, aio.AioRpcError):
            async with asyncio.timeout(timeout_s):  # wait_for may lose a cancel
                taken = wire.SESSION_TAKEN[0] in await self._call.initial_metadata()
        self.begin()
        return taken

    def start(self, stream: int, request: bytes) -> None:
        """Sends an encoded GenerateRequest."""
        self._starts.append(wire.start(stream, request))
        self._something.set()

    def cancel(self, streams: Iterable[int]) -> None:
        """Asks for the end of streams, after the starts that were handed in before."""
        self._cancels.extend(streams)
        self._something.set()

    async def read(self) -> bytes | None:
        """The next encoded Frame; None at the end of the session. Raises AioRpcError, or CancelledError after `cut`."""
        raw = await self._call.read()
        return None if raw is EOF else raw

    async def status(self) -> tuple[Any, str]:
        """gRPC code and details of a session that ended."""
        return await self._call.code(), await self._call.details() or ""

    def cut(self) -> None:
        """Ends the session here and now."""
        self._call.cancel()

    async def end(self) -> None:
        """Cuts, and waits for the writer."""
        if self._writer is not None:
            self._writer.cancel()
            await asyncio.gather(self._writer, return_exceptions=True)
        self._call.cancel()

    async def _write(self) -> None:
        try:
            while True:
                await self._something.wait()
                self._something.clear()
                while self._starts or self._cancels:
                    await self._call.write(self._take())
        except (aio.AioRpcError, asyncio.InvalidStateError):
            self._call.cancel()  # the reader tells why

    def _take(self) -> bytes:
        """One ClientFrame. Cancels go after all starts, in the last message."""
        size, taken = 0, 0
        for start in self._starts:
            if taken and size + len(start) > MAX_BATCH_BYTES:
                break
            size += len(start)
            taken += 1
        batch, self._starts = self._starts[:taken], self._starts[taken:]
        if not self._starts and self._cancels:
            batch.append(wire.cancel(self._cancels))
            self._cancels = []
        return b"".join(batch)
