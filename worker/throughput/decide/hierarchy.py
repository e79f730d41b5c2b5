"""Which ranks reduce among themselves before the groups' first ranks do so across groups.

Gloo's and NCCL's ring take 2(n - 1) steps one after another. Two levels of g groups take 2(n/g - 1) + 2(g - 1) steps
and a broadcast: least at g = sqrt(n). Declared sites are the groups where there are any, since a step between sites is
the dear one; otherwise a large flat group is cut into blocks of neighbouring ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

FLAT_RANKS: Final = 8  # up to this many, one ring; at 16, two levels take a third of the CPU (docs/decisions.md)


def reduction_groups(sites: Sequence[str], by_site: bool) -> list[str]:
    """The group of each rank; one group for all means a flat reduction. Every rank derives the same."""
    if by_site and len(set(sites)) > 1:
        return list(sites)
    size = len(sites)
    block = size if size <= FLAT_RANKS else math.isqrt(size - 1) + 1
    return [f"block-{rank // max(block, 1)}" for rank in range(size)]
