"""Periodic loops go on after a fault, and every fault is counted and logged without a flood."""

from __future__ import annotations

import asyncio
import logging

import pytest

from megatoken.process import supervise
from megatoken.process.supervise import FaultLog, Faults, every


async def test_a_loop_goes_on_after_each_fault_and_counts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "AFTER_FAULT_S", 0.0)
    faults = Faults()
    turns = 0
    enough = asyncio.Event()

    def step() -> None:
        nonlocal turns
        turns += 1
        if turns == 6:
            enough.set()
        if turns % 2:
            raise KeyError("x")

    loop = asyncio.create_task(every(0.0, step, "turns", faults.caught))
    await asyncio.wait_for(enough.wait(), 5)
    loop.cancel()
    with pytest.raises(asyncio.CancelledError):
        await loop
    assert faults.counts["turns"] >= 3  # it may have had another turn


async def test_a_step_may_wait_and_a_broken_count_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "AFTER_FAULT_S", 0.0)
    enough = asyncio.Event()
    turns = 0

    async def step() -> None:
        nonlocal turns
        await asyncio.sleep(0)
        turns += 1
        if turns == 3:
            enough.set()
        raise RuntimeError

    def count(_name: str, _error: Exception) -> None:
        raise OSError

    loop = asyncio.create_task(every(0.0, step, "turns", count))
    await asyncio.wait_for(enough.wait(), 5)
    loop.cancel()
    assert await asyncio.gather(loop, return_exceptions=True)


def test_a_name_is_logged_once_a_second_with_the_number_in_between(caplog: pytest.LogCaptureFixture) -> None:
    times = iter((0.0, 0.1, 0.2, 1.5, 1.5))
    faults = Faults(FaultLog(lambda: next(times)))
    for _ in range(4):
        faults.caught("frame", ValueError("x"))
    faults.caught("tick", ValueError("y"))
    assert faults.counts == {"frame": 4, "tick": 1}
    assert [(record.fields["doing"], record.fields["unlogged"]) for record in caplog.records] == [  # type: ignore[attr-defined]
        ("frame", 0),
        ("frame", 2),
        ("tick", 0),
    ]
    assert all(record.levelno == logging.ERROR and record.exc_info for record in caplog.records)
