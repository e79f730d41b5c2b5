"""Pauses between attempts, and that nothing but a cancel ends the loop."""

from __future__ import annotations

import asyncio

import pytest

from megatoken.reconnect import Pauses, keep_connected


def test_pauses_double_up_to_the_longest_and_begin_again_after_a_connection_that_lasted() -> None:
    pauses = Pauses(first_s=0.1, longest_s=0.5, settled_s=5.0)
    assert [pauses.after(0.0) for _ in range(5)] == [0.1, 0.2, 0.4, 0.5, 0.5]
    assert pauses.after(4.9) == 0.5
    assert [pauses.after(5.0), pauses.after(0.0), pauses.after(0.0)] == [0.1, 0.1, 0.2]


def test_a_year_of_failures_overflows_nothing() -> None:
    pauses = Pauses(longest_s=2.0, failures=10**7)
    assert pauses.after(0.0) == 2.0


async def test_it_goes_on_after_faults_until_it_is_cancelled() -> None:
    faults: list[Exception] = []
    attempts = 0
    fourth = asyncio.Event()

    async def connect() -> None:
        nonlocal attempts
        attempts += 1
        if attempts == 2:
            raise OSError("no certificate")
        if attempts == 4:
            fourth.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(keep_connected(connect, Pauses(0.001, 0.001), faults.append))
    async with asyncio.timeout(5):
        await fourth.wait()
    assert [str(fault) for fault in faults] == ["no certificate"]
    assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_fault_that_the_caller_raises_again_ends_it() -> None:
    def raise_it(error: Exception) -> None:
        raise error

    async def connect() -> None:
        raise ValueError("ours")

    with pytest.raises(ValueError, match="ours"):
        await keep_connected(connect, Pauses(), raise_it)


def test_pauses_that_nobody_set() -> None:
    pauses = Pauses()
    assert [pauses.after(lasted) for lasted in (0.0, 4.99, 0.0, 0.0, 0.0, 0.0, 0.0, 5.0)] == [
        0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 0.05,
    ]  # fmt: skip


async def test_the_pause_is_by_how_long_the_connection_lasted(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    now, lasting = 1000.0, iter([0.0, 1.0, 4.9, 5.0, 0.5])

    class Clock:
        def time(self) -> float:
            return now

    async def sleep(seconds: float) -> None:
        nonlocal now
        slept.append(seconds)
        now += seconds

    async def connect() -> None:
        nonlocal now
        for seconds in lasting:
            now += seconds
            return
        raise asyncio.CancelledError

    monkeypatch.setattr(asyncio, "get_running_loop", Clock)
    monkeypatch.setattr(asyncio, "sleep", sleep)
    with pytest.raises(asyncio.CancelledError):
        await keep_connected(connect, Pauses(0.1, 10.0, 5.0), lambda _: None)
    assert slept == [0.1, 0.2, 0.4, 0.1, 0.1]
