"""Keeps the edge's session with its router open: a ColumnSession, and another when it is lost or its router drains.

What many requests hand in during one turn of the event loop goes out as one ClientFrame. Streams have numbers that grow
over all sessions, so that a session which is left (its router drains) goes on with its requests beside the next one.
Knows streams by number only. Called by session.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Container
from typing import Final

from megatoken.errors import MegatokenError, UnavailableError
from megatoken.log import log_event
from megatoken.reconnect import Pauses, keep_connected
from megatoken.router.client.columns import ColumnSession
from megatoken.tls import ClientTls
from megatoken.tokens.frames import MalformedFrame
from megatoken.tokens.wire import MAX_REQUEST_BYTES
from megatoken.v1.frame_columns_pb2 import Frame

CONNECT_TIMEOUT_S: Final = 2.0
CANCEL_AGAIN_S: Final = 1.0
logger = logging.getLogger(__name__)


class RouterLink:
    """The callbacks are called in the event loop that `start` ran in, and must not block.

    `on_lost(problem, streams)`: a session ended, and with it whatever ran of these. `on_connected`: there is one.
    """

    def __init__(
        self,
        address: str,
        on_frame: Callable[[Frame], None],
        on_lost: Callable[[str, Container[int]], None],
        tls: ClientTls | None = None,
        key: str | None = None,
        max_request_bytes: int = MAX_REQUEST_BYTES,
        on_connected: Callable[[], None] = lambda: None,
    ) -> None:
        self.address = address
        self._on_frame = on_frame
        self._on_lost = on_lost
        self._on_connected = on_connected
        self._tls = tls
        self._max_request_bytes = max_request_bytes
        self._metadata = (("authorization", f"Bearer {key}"),) if key else ()
        self._connected = asyncio.Event()
        self._session: ColumnSession | None = None
        self._left: dict[asyncio.Task[None], ColumnSession] = {}  # their routers drain
        self._renewed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._next = 1
        self.problem = f"router {address} does not answer"
        self.faults = 0  # failures of our own on the way to the router; one that is away is none

    @property
    def connected(self) -> bool:
        """Whether requests can be sent now."""
        return self._session is not None

    def start(self) -> None:
        """Begins to connect. Call in the event loop."""
        self._task = asyncio.create_task(
            keep_connected(self._one_session, Pauses(), self._failed), name="edge-router-link"
        )

    async def wait_connected(self, timeout_s: float) -> bool:
        """Waits for a session; False when there is none in time."""
        try:
            async with asyncio.timeout(timeout_s):  # wait_for may lose a cancel
                while self._session is None:  # one that was there may be gone before this task's turn
                    await self._connected.wait()
        except TimeoutError:
            return False
        return True

    def submit(self, request: bytes) -> int:
        """Sends an encoded GenerateRequest; returns its stream number, which no other request of the session gets."""
        if self._session is None:
            raise UnavailableError(self.problem)
        return self._session.submit(request)

    def cancel(self, stream: int) -> None:
        """Asks for the end of a stream. It still ends with a Finish."""
        for session in (self._session, *self._left.values()):
            if session is not None and stream in session.numbers:
                session.cancel((stream,))

    def renew(self) -> None:
        """The router takes no new request in this session: leaves it to those it has, and opens another."""
        if self._session is not None:
            self._renewed.set()

    async def close(self) -> None:
        """Ends every session and waits for it; requests that one still has are told."""
        while tasks := [task for task in (self._task, *self._left) if task is not None and not task.done()]:
            for task in tasks:
                task.cancel()  # again, should a library on the way lose one
            await asyncio.wait(tasks, timeout=CANCEL_AGAIN_S)

    def _failed(self, error: Exception) -> None:
        self.faults += 1
        logger.error("the link to router %s failed, and goes on", self.address, exc_info=error)

    async def _one_session(self) -> None:
        """From connecting until the session ends or is left."""
        self.problem = f"the edge cannot connect to router {self.address}"
        session = ColumnSession(self.address, self._metadata, self._tls, self._max_request_bytes, self._next)
        try:
            await session.open(CONNECT_TIMEOUT_S)
        except MegatokenError as error:
            self._note(error)
            await session.close()
            return
        except BaseException:
            await session.close()
            raise
        self._session = session
        self._renewed.clear()
        self._connected.set()
        reading = asyncio.create_task(self._read(session), name="edge-router-frames")
        renewed = asyncio.create_task(self._renewed.wait())
        try:
            self._on_connected()
            await asyncio.wait((reading, renewed), return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._next = session.numbers.following
            self._session = None
            self._connected.clear()
            renewed.cancel()
            if self._renewed.is_set() and not reading.done():
                self._left[reading] = session
                reading.add_done_callback(self._left_ended)
            else:
                reading.cancel()
                await asyncio.wait((reading,))
        if reading.done() and not reading.cancelled():
            reading.result()  # a fault of ours is told to `_failed`

    def _left_ended(self, reading: asyncio.Task[None]) -> None:
        del self._left[reading]
        error = None if reading.cancelled() else reading.exception()
        if isinstance(error, Exception):
            self._failed(error)

    async def _read(self, session: ColumnSession) -> None:
        """Every frame of a session to its end. However that comes, the session's requests are told."""
        self.problem = f"the edge failed on what router {self.address} sent"
        try:
            async for frame in session.frames():
                self._on_frame(frame)
            self.problem = f"router {self.address} ended the session"
        except MegatokenError as error:
            self._note(error)
        except asyncio.CancelledError:
            self.problem = f"the edge closed its session with router {self.address}"
            raise
        except MalformedFrame as error:
            self.problem = f"router {self.address} sent a malformed frame: {error}"
        finally:
            if session is self._session:  # nothing is submitted to it from here on
                self._session = None
                self._connected.clear()
            try:
                await session.close()
            finally:
                log_event(logger, "edge.router_lost", self.problem, level=logging.WARNING, router=self.address)
                self._on_lost(self.problem, session.numbers)

    def _note(self, error: MegatokenError) -> None:
        self.problem = str(error)
        if type(error) is MegatokenError:  # a fault inside the router: for our log, not for its clients' eyes
            logger.error("%s", error)
            self.problem = f"router {self.address} failed"
