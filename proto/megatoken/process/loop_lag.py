"""How late an event loop is: what holds it up, a long step or a hostile caller, holds up everybody it serves.

A timer that should fire every PERIOD_S notes how late it fires. While the loop is held up no timer fires, so one late
firing stands for all that were due meanwhile: each is counted with the lateness it had. So a quantile is over time, as
a token that arrives at any moment would meet it, and not over firings.
"""

from __future__ import annotations

import asyncio
from typing import Final

import numpy as np

from megatoken.metrics import FastHistogram

PERIOD_S: Final = 0.2  # each firing of an idle process costs 0.1 to 0.3 ms of cold caches beside a busy engine
LOOP_LAG_BUCKETS_S: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_MOST_AT_ONCE: Final = 2000  # 100 s: a process that was stopped for hours must not count for as long


async def watch_loop(lag_s: FastHistogram) -> None:
    """Observes the running loop's lateness until cancelled."""
    loop = asyncio.get_running_loop()
    due_s = loop.time() + PERIOD_S
    while True:
        await asyncio.sleep(due_s - loop.time())
        late_s = max(0.0, loop.time() - due_s)
        note(lag_s, late_s)
        due_s = loop.time() + PERIOD_S


def note(lag_s: FastHistogram, late_s: float) -> None:
    """Counts one firing that was `late_s` late, and those that were due while the loop was held up."""
    if late_s < PERIOD_S:
        lag_s.observe(late_s)
    else:
        missed = min(int(late_s / PERIOD_S) + 1, _MOST_AT_ONCE)
        lag_s.observe_many(late_s - PERIOD_S * np.arange(missed))
