"""Intervals hold the median as often as they say, and verdicts are given on them."""

from __future__ import annotations

import random
import statistics

import pytest

from tests.bench.pairs import Interval, Verdict, interval, spread


@pytest.mark.parametrize("count", [6, 30, 31, 101])
def test_an_interval_holds_the_true_median_as_often_as_it_says(count: int) -> None:
    rng = random.Random(count)
    held = 0
    for _ in range(2000):
        found = interval([rng.lognormvariate(0.0, 0.5) for _ in range(count)])  # its median is 1
        assert found.low <= found.median <= found.high
        held += found.low <= 1.0 <= found.high
    assert held / 2000 > 0.945


def test_the_ranks_are_those_of_the_tables() -> None:
    found = interval([float(value) for value in range(1, 31)])
    assert (found.low, found.median, found.high) == (10.0, 15.5, 21.0), "n = 30: the 10th and the 21st"


def test_a_few_values_give_all_of_them() -> None:
    assert interval([3.0, 1.0, 2.0]) == Interval(1.0, 2.0, 3.0)
    assert interval([1.0]) == Interval(1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="none is not allowed"):
        interval([])


@pytest.mark.parametrize(
    ("low", "high", "at_least", "verdict"),
    [
        (0.95, 0.99, True, Verdict.MET),
        (0.94, 0.96, True, Verdict.UNKNOWN),
        (0.90, 0.949, True, Verdict.MISSED),
        (0.90, 0.949, False, Verdict.MET),
        (0.94, 0.96, False, Verdict.UNKNOWN),
        (0.90, 0.95, False, Verdict.MET),
        (0.951, 0.99, False, Verdict.MISSED),
    ],
)
def test_a_verdict_is_given_on_the_whole_interval(low: float, high: float, at_least: bool, verdict: Verdict) -> None:
    assert Interval(low, (low + high) / 2, high).verdict(0.95, at_least=at_least) is verdict


def test_a_spread_is_the_middle_halfs() -> None:
    values = [90.0, 95.0, 100.0, 105.0, 1000.0]
    low, middle, high = statistics.quantiles(values, n=4)
    assert spread(values) == (high - low) / middle
