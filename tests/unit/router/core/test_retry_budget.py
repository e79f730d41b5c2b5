"""How many retries are allowed: the floor, the share of what is live or was started, and the window of 10 s."""

from __future__ import annotations

import pytest

from megatoken.router.core.retry_budget import RetryBudget


def allowed(budget: RetryBudget, live: int, now: float) -> int:
    """How many are granted in a row, 50 at most."""
    taken = 0
    while taken < 50 and budget.take(live, now):
        taken += 1
    return taken


@pytest.mark.parametrize(
    ("ratio", "floor", "started", "live", "granted"),
    [
        (1.0, 0, 0, 0, 0),
        (0.0, 3, 9, 9, 3),
        (1.0, 0, 4, 0, 4),
        (1.0, 0, 0, 4, 4),
        (1.0, 2, 3, 4, 9),
        (0.5, 1, 3, 4, 5),
        (2.0, 1, 3, 4, 15),
    ],
)
def test_the_floor_and_a_share_of_the_requests_live_or_started_may_be_retried(
    ratio: float, floor: int, started: int, live: int, granted: int
) -> None:
    budget = RetryBudget(ratio, floor)
    for _ in range(started):
        budget.started(100.0)
    assert allowed(budget, live, 100.0) == granted
    assert not budget.take(live, 100.9)


@pytest.mark.parametrize(
    ("started_s", "now", "granted"),
    [(100.0, 109.999, 3), (100.9, 109.999, 3), (100.0, 110.0, 0), (100.9, 110.0, 0), (101.0, 110.999, 3)],
)
def test_what_was_started_counts_for_the_ten_seconds_that_begin_with_its_own_second(
    started_s: float, now: float, granted: int
) -> None:
    budget = RetryBudget(1.0, 0)
    for _ in range(3):
        budget.started(started_s)
    assert allowed(budget, 0, now) == granted


def test_retries_come_back_after_their_window_and_only_those() -> None:
    budget = RetryBudget(0.0, 3)
    assert [budget.take(0, now) for now in (100.0, 100.5, 105.0, 106.0)] == [True, True, True, False]
    assert not budget.take(0, 109.9)
    assert allowed(budget, 0, 110.0) == 2
    assert allowed(budget, 0, 114.9) == 0
    assert allowed(budget, 0, 115.0) == 1


@pytest.mark.parametrize(("now", "granted"), [(109.9, 4), (110.0, 3), (111.0, 1), (112.9, 1), (113.0, 0)])
def test_each_second_leaves_the_window_by_itself(now: float, granted: int) -> None:
    budget = RetryBudget(1.0, 0)
    for started_s in (100.0, 101.0, 101.5, 103.0):
        budget.started(started_s)
    assert allowed(budget, 0, now) == granted
