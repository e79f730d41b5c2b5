"""Percentiles of time to first token and between tokens over the last minute, from log-spaced buckets. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

# From 0.1 ms to about 1000 s, 10 buckets a factor of 2: a percentile is right to 7%.
_LOW_S: Final = 1e-4
_PER_OCTAVE: Final = 10
_BUCKETS: Final = 233
_SLICE_S: Final = 10.0
_SLICES: Final = 6

_Slice = tuple[float, npt.NDArray[np.int64]]  # when it began, counts by bucket


def edges_s() -> npt.NDArray[np.float64]:
    """Upper edges of the buckets."""
    return _LOW_S * 2.0 ** (np.arange(1, _BUCKETS + 1) / _PER_OCTAVE)


class SlidingHistogram:
    """A sliding minute in six slices.

    One thread adds; any other may ask for percentiles, which changes nothing. So the slices are a tuple that is
    replaced whole.
    """

    def __init__(self) -> None:
        self._slices: tuple[_Slice, ...] = ()

    def add(self, seconds: float, now: float) -> None:
        bucket = min(int(math.log2(max(seconds, _LOW_S) / _LOW_S) * _PER_OCTAVE), _BUCKETS - 1)
        self._current(now)[bucket] += 1

    def add_many(self, seconds: npt.NDArray[np.float64], now: float) -> None:
        bucket = (np.log2(np.maximum(seconds, _LOW_S) / _LOW_S) * _PER_OCTAVE).astype(np.int64)
        counts = np.bincount(np.minimum(bucket, _BUCKETS - 1), minlength=_BUCKETS)
        self._current(now)[:] += counts

    def percentiles_ms(self, shares: tuple[float, ...], now: float) -> list[float]:
        """Over the last minute; empty when nothing came."""
        recent = np.zeros(_BUCKETS, np.int64)
        for _, counts in _within(self._slices, now):
            recent += counts
        total = int(recent.sum())
        if not total:
            return []
        reached = np.cumsum(recent)
        return [1e3 * float(edges_s()[int(np.searchsorted(reached, share * total))]) for share in shares]

    def _current(self, now: float) -> npt.NDArray[np.int64]:
        start = now - now % _SLICE_S
        if not self._slices or self._slices[-1][0] != start:
            self._slices = (*_within(self._slices, now), (start, np.zeros(_BUCKETS, np.int64)))
        return self._slices[-1][1]


def _within(slices: Iterable[_Slice], now: float) -> Iterator[_Slice]:
    """Those of the last minute."""
    oldest = now - now % _SLICE_S - _SLICE_S * _SLICES
    return (piece for piece in slices if piece[0] > oldest)


class Latencies:
    """Of one router, for its status: what its clients waited for tokens."""

    def __init__(self) -> None:
        self.first_token = SlidingHistogram()
        self.between_tokens = SlidingHistogram()
