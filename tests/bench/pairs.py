"""Statistics of paired measurements: two ways measured one right after the other, ratio by ratio. Pure.

A machine that slows down slows both of a pair. Verdicts are given on the interval and not on the median: where the bar
lies inside it, the machine was too noisy to tell.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from math import comb
from typing import Any

CONFIDENCE = 0.95


class Verdict(StrEnum):
    """Whether a bar is met."""

    MET = "met"
    MISSED = "MISSED"
    UNKNOWN = "too noisy to tell"


@dataclass(frozen=True, slots=True)
class Interval:
    """A median, and between what it lies."""

    low: float
    median: float
    high: float

    def verdict(self, bar: float, *, at_least: bool) -> Verdict:
        """`at_least`: more is better; else less is. The bar itself is enough."""
        if at_least:
            return Verdict.MET if self.low >= bar else Verdict.MISSED if self.high < bar else Verdict.UNKNOWN
        return Verdict.MET if self.high <= bar else Verdict.MISSED if self.low > bar else Verdict.UNKNOWN

    def json(self) -> dict[str, Any]:
        return asdict(self)


def interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """The median with the narrowest symmetric pair of order statistics that holds it with that confidence.

    Makes no assumption on the distribution but that the values are independent: the number of them below the true
    median is binomial with p = 1/2 (David and Nagaraja, Order Statistics, 7.1). With fewer than six values of 95% there
    is no such pair, and the interval is all of them.
    """
    ordered, count = sorted(values), len(values)
    if not count:
        raise ValueError("values: none is not allowed; at least one")
    outside, cut = 0.0, 0
    while cut < count // 2:
        outside += comb(count, cut) / 2.0**count
        if 2 * outside > 1 - confidence:
            break
        cut += 1
    rank = max(cut - 1, 0)
    return Interval(ordered[rank], statistics.median(ordered), ordered[count - 1 - rank])


def spread(values: Sequence[float]) -> float:
    """How far apart one way's own measurements are: the middle half's width, of the median."""
    low, middle, high = statistics.quantiles(values, n=4)
    return (high - low) / middle
