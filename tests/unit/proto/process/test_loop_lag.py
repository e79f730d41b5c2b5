"""A loop that is held up shows as late for as long as it was held up."""

from __future__ import annotations

import asyncio
import contextlib
import time

from megatoken.metrics import FastHistogram
from megatoken.process.loop_lag import LOOP_LAG_BUCKETS_S, note, watch_loop


def test_a_late_firing_counts_for_those_that_were_due_meanwhile() -> None:
    lag = FastHistogram(LOOP_LAG_BUCKETS_S)
    note(lag, 0.0005)
    assert lag.counts.sum() == 1
    note(lag, 0.45)  # 450, 250 and 50 ms
    assert lag.counts.sum() == 4
    assert abs(lag.sum - 0.7505) < 1e-6


def test_a_process_that_was_stopped_for_long_counts_no_more_than_a_bound() -> None:
    lag = FastHistogram(LOOP_LAG_BUCKETS_S)
    note(lag, 86_400.0)
    assert lag.counts.sum() == 2000


async def test_a_loop_held_up_is_seen() -> None:
    lag = FastHistogram(LOOP_LAG_BUCKETS_S)
    watching = asyncio.create_task(watch_loop(lag))
    await asyncio.sleep(0.05)
    time.sleep(0.9)  # noqa: ASYNC251
    await asyncio.sleep(0.25)
    watching.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await watching
    assert lag.quantiles([0.999])[0] > 0.2
    assert lag.counts[lag.bounds.searchsorted(0.1) :].sum() >= 3, "nearly a second is several firings"
