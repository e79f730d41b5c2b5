"""What a benchmark must reach, and whether it did: as lines for a terminal, an exit status, and rows of a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.bench.pairs import Interval, Verdict

STATUS = {Verdict.MISSED: 1, Verdict.UNKNOWN: 3}  # of a command, worst first


@dataclass(frozen=True, slots=True)
class Bar:
    """`key` leads through the results: "session.cpu_us_per_token"."""

    key: str
    bound: float
    at_least: bool
    meaning: str = ""

    @property
    def text(self) -> str:
        return f"{'at least' if self.at_least else 'at most'} {self.bound:,g}"


@dataclass(frozen=True, slots=True)
class Row:
    """A bar, and what was reached."""

    bar: Bar
    reached: Interval

    @property
    def verdict(self) -> Verdict:
        return self.reached.verdict(self.bar.bound, at_least=self.bar.at_least)

    @property
    def text(self) -> str:
        """1.23, or 1.23 (1.20 to 1.25)"""
        shown = number(self.reached.median)
        if self.reached.low == self.reached.high:
            return shown
        return f"{shown} ({number(self.reached.low)} to {number(self.reached.high)})"


def rows(bars: Sequence[Bar], found: Mapping[str, Any]) -> list[Row]:
    """A row for each bar whose figure was measured."""
    reached = ((bar, _at(found, bar.key)) for bar in bars)
    return [Row(bar, value) for bar, value in reached if value is not None]


def lines(judged: Sequence[Row]) -> list[str]:
    """For a terminal."""
    widths = [max([len(row.bar.key) for row in judged], default=0), max([len(row.text) for row in judged], default=0)]
    return [
        f"{row.bar.key:{widths[0]}}  {row.text:>{widths[1]}}  {row.bar.text:<20} {row.verdict}"
        + (f"  {row.bar.meaning}" if row.bar.meaning else "")
        for row in judged
    ]


def status(judged: Sequence[Row]) -> int:
    """0: every bar is met; 1: one is missed; 3: the machine was too noisy to tell of one."""
    given = {row.verdict for row in judged}
    return next((code for verdict, code in STATUS.items() if verdict in given), 0)


def number(value: float) -> str:
    """As many digits as say something."""
    size = abs(value)
    return f"{value:,.0f}" if size >= 1000 or value == int(value) else f"{value:.1f}" if size >= 100 else f"{value:.3g}"


def _at(found: Mapping[str, Any], key: str) -> Interval | None:
    value: Any = found
    for name in key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    if value is None:
        return None
    return Interval(**value) if isinstance(value, Mapping) else Interval(float(value), float(value), float(value))
