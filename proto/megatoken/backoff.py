"""How long to wait after failures in a row, everywhere. Pure."""

from __future__ import annotations

MOST_DOUBLINGS = 64


def doubling_pause_s(failures: int, first_s: float, longest_s: float) -> float:
    """`first_s` after the first failure, twice as long after each further one, never more than `longest_s`."""
    return min(first_s * 2.0 ** min(max(failures - 1, 0), MOST_DOUBLINGS), longest_s)
