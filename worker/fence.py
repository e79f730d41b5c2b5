"""Until when this replica may serve: as long as the controller renews it. It fences itself when that ends.

A replica that the controller cannot reach will be replaced, and then must not serve beside its replacement, whatever
the network and Ray believe. Time counts on this process's clock alone: a renewal names a moment that an earlier answer
told, so what was long on its way gives no more than was meant, and the controller knows that all is over `lease_s`
after the last answer that reached it. A renewal that comes late opens the replica again: the engine is still loaded.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final, Protocol

from megatoken.log import log_event

MAX_LEASE_S: Final = 3600.0

_log = logging.getLogger(__name__)


class Fenced(Protocol):
    """What the fence closes and opens."""

    def fence(self, reason: str) -> None:
        """Serve nobody from now on; what runs ends with UNAVAILABLE and goes on elsewhere."""

    def unfence(self) -> None:
        """Serve again."""


class Fence:
    """Open until it is begun or renewed: a worker run alone, which nobody renews, serves as long as it likes."""

    def __init__(self, replica: Fenced, loop: asyncio.AbstractEventLoop) -> None:
        self._replica, self._loop = replica, loop
        self._until_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self.closed = False

    def renew(self, stamp_s: float, lease_s: float) -> float:
        """Serve until `stamp_s` (of this loop's clock; 0: no moment yet) + `lease_s`; returns a stamp of now."""
        now = self._loop.time()
        until_s = min(stamp_s, now) + min(lease_s, MAX_LEASE_S)
        if stamp_s > 0 and until_s > max(self._until_s, now):
            self._serve_until(until_s)
            if self.closed:
                self.closed = False
                log_event(_log, "replica.unfenced", "the controller renews it again")
                self._replica.unfence()
        return now

    def begin(self, lease_s: float) -> None:
        """Serve for `lease_s` from now: one that is cut off before its first renewal must not serve for ever."""
        self._serve_until(self._loop.time() + min(lease_s, MAX_LEASE_S))

    def stop(self) -> None:
        """The process ends."""
        if self._timer is not None:
            self._timer.cancel()

    def _serve_until(self, until_s: float) -> None:
        self._until_s = until_s
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(until_s, self._close)

    def _close(self) -> None:
        self.closed = True
        log_event(_log, "replica.fenced", "the controller has not renewed it in time", level=logging.WARNING)
        self._replica.fence("the controller has not renewed it in time")
