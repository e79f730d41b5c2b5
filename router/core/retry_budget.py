"""Bounds retries to a share of what is started, so that a failing fleet is not buried under its own retries. Pure."""

from __future__ import annotations

from collections import deque

WINDOW_S = 10.0


class RetryBudget:
    """ratio: retries per request live now or started in the last 10 s; floor: retries in 10 s that are always allowed.

    With ratio 1 every live request may move about once in 10 s: the loss of any part of the fleet is covered, a storm
    of repeated moves is not.
    """

    def __init__(self, ratio: float, floor: int) -> None:
        self._ratio = ratio
        self._floor = floor
        self._slices: deque[list[float]] = deque()  # [second, started, retried]
        self._started = 0.0
        self._retried = 0.0

    def started(self, now: float) -> None:
        self._slice(now)[1] += 1
        self._started += 1

    def take(self, live: int, now: float) -> bool:
        """Whether one more retry is allowed; takes it if so. `live` is requests in the router."""
        current = self._slice(now)
        if self._retried >= self._floor + self._ratio * (self._started + live):
            return False
        current[2] += 1
        self._retried += 1
        return True

    def _slice(self, now: float) -> list[float]:
        second = float(int(now))
        while self._slices and self._slices[0][0] <= now - WINDOW_S:
            _, started, retried = self._slices.popleft()
            self._started -= started
            self._retried -= retried
        if not self._slices or self._slices[-1][0] != second:
            self._slices.append([second, 0.0, 0.0])
        return self._slices[-1]
