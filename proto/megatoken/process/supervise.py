"""What a long-lived process does with its own faults: counts each, logs it, and goes on with the rest.

A loop that ends at its first exception leaves a process that looks alive and does half its work. So every periodic
loop runs under `every`, and code that takes in a batch for many catches per part and says so to a `Faults`. This is
the one place where a broad except belongs; an except that does not call `caught` hides a fault.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Final

from megatoken.log import log_event

LOG_EVERY_S: Final = 1.0  # of one name; a fault in each of a thousand frames is one line with a number
AFTER_FAULT_S: Final = 0.05  # on top of a loop's own pause, so that one whose period fails does not spin

logger = logging.getLogger(__name__)


class Faults:
    """Faults by the name of what was being done, for the process's metrics. `tell`, if any, hears of each.

    Plain code without clock or logging; `log_fault` is what a process passes as `tell`, a test passes one that raises.
    """

    def __init__(self, tell: Callable[[str, Exception], None] | None = None) -> None:
        self.counts: Counter[str] = Counter()
        self._tell = tell

    def caught(self, name: str, error: Exception) -> None:
        """Call it in the except block. `name` is out of a bounded set: it becomes a label."""
        self.counts[name] += 1
        if self._tell is not None:
            self._tell(name, error)


class FaultLog:
    """Logs faults with their traceback, each name at most once in LOG_EVERY_S with the number of those in between."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._next_s: dict[str, float] = {}
        self._silent: Counter[str] = Counter()

    def __call__(self, name: str, error: Exception) -> None:
        now = self._clock()
        if now < self._next_s.get(name, 0.0):
            self._silent[name] += 1
            return
        self._next_s[name] = now + LOG_EVERY_S
        fields = {"doing": name, "unlogged": self._silent.pop(name, 0)}
        logger.error("%s: %s", name, type(error).__name__, exc_info=error, extra={"event": "fault", "fields": fields})


async def every(
    period_s: float,
    step: Callable[[], Awaitable[None] | None],
    name: str,
    count: Callable[[str, Exception], None],
) -> None:
    """Calls `step`, again and again, `period_s` after the last call ended, until cancelled.

    An exception of `step` goes to `count(name, error)` (as a rule `Faults.caught`), and the loop goes on after its
    usual pause. If `count` raises too, that is logged.
    """
    while True:
        try:
            await asyncio.sleep(period_s)
            done = step()
            if inspect.isawaitable(done):
                await done
        except Exception as error:
            try:
                count(name, error)
            except Exception as another:
                log_event(logger, "fault", f"counting a fault in {name} failed: {another!r}", level=logging.ERROR)
            await asyncio.sleep(AFTER_FAULT_S)
