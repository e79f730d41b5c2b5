"""The inbox: frames that came from workers, taken in together.

When little comes, a frame is taken in at the end of the loop's present turn. Under load, frames of GATHER_S are
gathered and sorted in one go: numpy's cost is per call, so eight frames cost little more than one.
"""

from __future__ import annotations

import asyncio
import time

from megatoken.router.core.state import RouterState
from megatoken.router.fleet.fleet import Endpoint
from megatoken.router.intake.intake import on_frames

GATHER_S = 0.002  # a tenth of a usual engine step


class Inbox:
    """`put` from the readers of all worker sessions; one event loop."""

    def __init__(self, state: RouterState, gather_s: float = GATHER_S) -> None:
        self._state = state
        self._gather_s = gather_s
        self._batch: list[tuple[Endpoint, bytes]] = []
        self._drained_s = 0.0

    def put(self, replica: Endpoint, raw: bytes) -> None:
        self._batch.append((replica, raw))
        if len(self._batch) == 1:
            loop = asyncio.get_running_loop()
            wait_s = self._drained_s + self._gather_s - time.monotonic()
            if wait_s > 0:
                loop.call_later(wait_s, self.drain)
            else:
                loop.call_soon(self.drain)

    def drain(self) -> None:
        """Takes in what has come."""
        if self._batch:
            batch, self._batch = self._batch, []
            self._drained_s = time.monotonic()
            on_frames(self._state, batch, self._drained_s)
