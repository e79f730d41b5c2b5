"""Keeps the edge's one session with its router open: a ColumnSession, and another when it is lost.

What many requests hand in during one turn of the event loop goes out as one ClientFrame. `on_lost` is told when a
session breaks, since its requests are gone. Knows streams by number only. Called by session.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
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
    """`on_frame` and `on_lost` are called in the event loop that `start` ran in, and must not block."""

    def __init__(
        self,
        address: str,
        on_frame: Callable[[Frame], None],
        on_lost: Callable[[str], None],
        tls: ClientTls | None = None,
        key: str | None = None,
        max_request_bytes: int = MAX_REQUEST_BYTES,
    ) -> None:
        self.address = address
        self._on_frame = on_frame
        self._on_lost = on_lost
        self._tls = tls
        self._max_request_bytes = max_request_bytes
        self._metadata = (("authorization", f"Bearer {key}"),) if key else ()
        self._connected = asyncio.Event()
        self._session: ColumnSession | None = None
        self._task: asyncio.Task[None] | None = None
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
        if self._session is not None:
            return True
        try:
            async with asyncio.timeout(timeout_s):  # wait_for may lose a cancel
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
        if self._session is not None:
            self._session.cancel((stream,))

    async def close(self) -> None:
        """Ends the session and waits for it; requests that it still has are told."""
        while self._task is not None and not self._task.done():
            self._task.cancel()  # again, should a library on the way lose one
            await asyncio.wait((self._task,), timeout=CANCEL_AGAIN_S)

    def _failed(self, error: Exception) -> None:
        self.faults += 1
        logger.error("the link to router %s failed, and goes on", self.address, exc_info=error)

    async def _one_session(self) -> None:
        """From connecting to the end. However that comes, the session's requests are told."""
        self.problem = f"the edge cannot connect to router {self.address}"
        session = ColumnSession(self.address, self._metadata, self._tls, self._max_request_bytes)
        try:
            await session.open(CONNECT_TIMEOUT_S)
            self._session = session
            self._connected.set()
            self.problem = f"the edge failed on what router {self.address} sent"
            async for frame in session.frames():
                self._on_frame(frame)
            self.problem = f"router {self.address} ended the session"
        except MegatokenError as error:
            self.problem = str(error)
            if type(error) is MegatokenError:  # a fault inside the router: for our log, not for its clients' eyes
                logger.error("%s", error)
                self.problem = f"router {self.address} failed"
        except asyncio.CancelledError:
            self.problem = f"the edge closed its session with router {self.address}"
            raise
        except MalformedFrame as error:
            self.problem = f"router {self.address} sent a malformed frame: {error}"
        finally:
            lost, self._session = self._session is not None, None
            self._connected.clear()
            try:
                await session.close()
            finally:
                if lost:
                    log_event(logger, "edge.router_lost", self.problem, level=logging.WARNING, router=self.address)
                    self._on_lost(self.problem)
