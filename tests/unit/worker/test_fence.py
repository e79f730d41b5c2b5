"""A replica serves only as long as it is renewed, whatever the network does to renewals."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from megatoken.worker.fence import Fence


class Loop:
    """A clock with timers, moved by hand."""

    def __init__(self) -> None:
        self.now, self.timers = 100.0, []  # type: ignore[var-annotated]

    def time(self) -> float:
        return self.now

    def call_at(self, when_s: float, call: Callable[[], None]) -> Any:
        handle = Handle(when_s, call)
        self.timers.append(handle)
        return handle

    def move_to(self, now: float) -> None:
        for handle in sorted(self.timers, key=lambda handle: handle.when_s):
            if handle.when_s <= now and not handle.done:
                self.now, handle.done = handle.when_s, True
                handle.call()
        self.now = now


class Handle:
    def __init__(self, when_s: float, call: Callable[[], None]) -> None:
        self.when_s, self.call, self.done = when_s, call, False

    def cancel(self) -> None:
        self.done = True


class Replica:
    def __init__(self) -> None:
        self.serves = True

    def fence(self, reason: str) -> None:
        self.serves = False

    def unfence(self) -> None:
        self.serves = True


@pytest.fixture
def parts() -> tuple[Loop, Replica, Fence]:
    loop, replica = Loop(), Replica()
    return loop, replica, Fence(replica, loop)  # type: ignore[arg-type]


def test_nobody_renews_a_worker_that_runs_alone(parts: tuple[Loop, Replica, Fence]) -> None:
    loop, replica, fence = parts
    assert fence.renew(0.0, 10.0) == 100.0, "a first question gives no time: it has no moment to count from"
    loop.move_to(10_000.0)
    assert replica.serves


def test_it_serves_until_the_lease_after_its_last_stamp_and_again_when_renewed(
    parts: tuple[Loop, Replica, Fence],
) -> None:
    loop, replica, fence = parts
    stamp_s = fence.renew(0.0, 10.0)
    loop.move_to(101.0)
    stamp_s = fence.renew(stamp_s, 10.0)  # until 110
    loop.move_to(109.9)
    assert replica.serves
    fence.renew(stamp_s, 10.0)  # until 111
    loop.move_to(110.9)
    assert replica.serves
    loop.move_to(111.0)
    assert not replica.serves
    late = fence.renew(stamp_s, 10.0)  # what it counts from is over: it stays closed, and tells a new moment
    assert not replica.serves
    fence.renew(late, 10.0)
    assert replica.serves
    loop.move_to(121.0)
    assert not replica.serves


def test_one_that_is_cut_off_before_its_first_renewal_closes_too(parts: tuple[Loop, Replica, Fence]) -> None:
    loop, replica, fence = parts
    fence.begin(10.0)
    loop.move_to(105.0)
    stamp_s = fence.renew(0.0, 10.0)  # gives no time, and takes none
    loop.move_to(109.9)
    assert replica.serves
    loop.move_to(110.0)
    assert not replica.serves
    fence.renew(stamp_s, 10.0)
    assert replica.serves
    loop.move_to(115.0)
    assert not replica.serves


@pytest.mark.parametrize("stamp_s", [1e18, float("inf")])
def test_a_stamp_of_the_future_gives_no_more_than_one_of_now(
    parts: tuple[Loop, Replica, Fence], stamp_s: float
) -> None:
    loop, replica, fence = parts
    fence.renew(stamp_s, 10.0)
    loop.move_to(110.0)
    assert not replica.serves


@pytest.mark.parametrize(
    ("stamp_s", "lease_s"), [(float("nan"), 10.0), (100.0, float("nan")), (100.0, -5.0), (-1.0, 10.0)]
)
def test_numbers_that_are_none_change_nothing(
    parts: tuple[Loop, Replica, Fence], stamp_s: float, lease_s: float
) -> None:
    loop, replica, fence = parts
    fence.renew(stamp_s, lease_s)
    loop.move_to(1e6)
    assert replica.serves


def test_a_renewal_that_was_long_on_its_way_gives_what_was_meant(parts: tuple[Loop, Replica, Fence]) -> None:
    """The controller counts from the answer that it got: nothing given later may reach beyond that."""
    loop, replica, fence = parts
    stamp_s = fence.renew(0.0, 10.0)  # the controller has this answer, and sends a renewal that lingers
    loop.move_to(109.0)
    fence.renew(stamp_s, 10.0)
    loop.move_to(110.0)
    assert not replica.serves


def test_the_real_loop_has_the_clock_that_timers_use() -> None:
    async def run() -> None:
        replica = Replica()
        fence = Fence(replica, asyncio.get_running_loop())
        fence.renew(fence.renew(0.0, 0.05), 0.05)
        assert replica.serves
        await asyncio.sleep(0.1)
        assert not replica.serves

    asyncio.run(run())
