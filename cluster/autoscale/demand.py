"""What a model is asked for, from what its routers have counted since they started. Pure.

Counts only grow, and begin anew with a router; a router that is gone takes what waits in it along. Rates are of the
last RATE_S, latencies of the last LATENCY_S.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from megatoken.cluster.autoscale.decide import Demand
from megatoken.metrics import quantiles

RATE_S: Final = 15.0
LATENCY_S: Final = 60.0
P99: Final = 0.99


@dataclass(frozen=True, slots=True)
class Counts:
    """What one router has counted of one model, and what waits and runs there now."""

    arrived: int = 0
    work_s: float = 0.0
    """A replica's full time that the arrived ones take."""
    measured: bool = False
    queued: int = 0
    queued_work_s: float = 0.0
    running: int = 0
    first_token: Sequence[int] = ()
    """Requests by time to first token, a bucket each."""
    between_tokens: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class _Step:
    """What came between two looks."""

    at_s: float
    seconds: float
    arrived: int
    work_s: float
    first_token: Sequence[int]
    between_tokens: Sequence[int]


class DemandMeter:
    """Of one model. Times are monotonic."""

    def __init__(self) -> None:
        self._before: dict[str, Counts] = {}
        self._read_s: float | None = None
        self._steps: deque[_Step] = deque()
        self._now: Mapping[str, Counts] = {}

    def read(self, routers: Mapping[str, Counts], now: float) -> None:
        """Takes what the routers that answer (by name) say now."""
        new = []
        for name, counts in routers.items():
            before = self._before.get(name, counts)
            new.append((counts, before if before.arrived <= counts.arrived else Counts()))
        if self._read_s is not None and now > self._read_s:
            self._steps.append(
                _Step(
                    now,
                    now - self._read_s,
                    sum(counts.arrived - before.arrived for counts, before in new),
                    sum(counts.work_s - before.work_s for counts, before in new),
                    _sum([_less(counts.first_token, before.first_token) for counts, before in new]),
                    _sum([_less(counts.between_tokens, before.between_tokens) for counts, before in new]),
                )
            )
        while self._steps and self._steps[0].at_s <= now - LATENCY_S:
            self._steps.popleft()
        self._before.update(routers)
        self._read_s, self._now = now, routers

    def demand(
        self, ttft_bounds_s: Sequence[float], itl_bounds_s: Sequence[float], engines_wait: int, tokens_per_s: float
    ) -> Demand:
        """As of the last `read`. `engines_wait`: requests that wait in engines."""
        recent = [step for step in self._steps if self._read_s is not None and step.at_s > self._read_s - RATE_S]
        seconds = sum(step.seconds for step in recent)
        now = self._now.values()
        measured = any(counts.measured for counts in now)
        arrived = sum(step.arrived for step in self._steps)
        mean_work_s = sum(step.work_s for step in self._steps) / arrived if arrived else 0.0
        return Demand(
            load=sum(step.work_s for step in recent) / seconds if measured and seconds else None,
            requests_per_s=sum(step.arrived for step in recent) / seconds if seconds else 0.0,
            waiting=engines_wait + sum(counts.queued for counts in now),
            waiting_work_s=engines_wait * mean_work_s + sum(counts.queued_work_s for counts in now),
            running=sum(counts.running for counts in now),
            tokens_per_s=tokens_per_s,
            ttft_s=quantile(ttft_bounds_s, _sum([step.first_token for step in self._steps]), P99),
            itl_s=quantile(itl_bounds_s, _sum([step.between_tokens for step in self._steps]), P99),
        )


def quantile(bounds: Sequence[float], counts: Sequence[int], share: float) -> float | None:
    """None: nothing was counted."""
    return quantiles(np.array(bounds), np.array(counts), [share])[0] if sum(counts) else None


def _less(counts: Sequence[int], before: Sequence[int]) -> list[int]:
    return [count - (before[index] if index < len(before) else 0) for index, count in enumerate(counts)]


def _sum(rows: Sequence[Sequence[int]]) -> list[int]:
    width = max((len(row) for row in rows), default=0)
    return [sum(row[index] for row in rows if index < len(row)) for index in range(width)]
