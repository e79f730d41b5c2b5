"""How a connection that ended is opened again: soon, then ever more rarely, and soon again once one had lasted."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from megatoken.backoff import doubling_pause_s


@dataclass(slots=True)
class Pauses:
    """Seconds between two attempts: the first, doubled after each that came to nothing, up to the longest."""

    first_s: float = 0.05
    longest_s: float = 2.0
    settled_s: float = 5.0  # a connection that lasted this long makes the next pause the first again
    failures: int = 0

    def after(self, lasted_s: float) -> float:
        """The pause after an attempt that lasted so long, from its beginning to the end of the connection."""
        self.failures = 0 if lasted_s >= self.settled_s else self.failures + 1
        return doubling_pause_s(self.failures, self.first_s, self.longest_s)


async def keep_connected(
    connect: Callable[[], Awaitable[None]], pauses: Pauses, on_fault: Callable[[Exception], None]
) -> None:
    """Until cancelled: connects and stays connected as long as that lasts, again and again.

    What `connect` raises is told to `on_fault` and ends that connection alone: a certificate that cannot be read just
    now, say, which the next attempt may find mended.
    """
    clock = asyncio.get_running_loop().time
    while True:
        began = clock()
        try:
            await connect()
        except Exception as error:
            on_fault(error)
        await asyncio.sleep(pauses.after(clock() - began))
