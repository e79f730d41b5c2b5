"""Due: what is to be done for requests at certain times; a heap whose size follows the live ones. Pure.

A request that ended leaves its entry behind, which would keep its prompt in memory until a deadline that may be weeks
away. Once more entries are of ended requests than of live ones, the heap is made anew: amortised, O(1) a request.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Final

from megatoken.router.core.lifecycle import RequestState
from megatoken.router.core.request import Request

_FEW: Final = 64  # entries that are not worth a clean-up


class Due:
    """`push`, then `pop_until` as time goes on; `ended` for each entry whose request ended before its time."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Request]] = []
        self._ordinal = 0  # breaks ties
        self._ended = 0

    def __len__(self) -> int:
        return len(self._heap)

    def push(self, when_s: float, request: Request) -> None:
        self._ordinal += 1
        heapq.heappush(self._heap, (when_s, self._ordinal, request))

    def pop_until(self, now: float) -> Iterator[Request]:
        """Those whose time has come and that have not ended, earliest first; what is pushed meanwhile counts too."""
        while self._heap and self._heap[0][0] <= now:
            request = heapq.heappop(self._heap)[2]
            if request.state is RequestState.FINISHED:
                self._ended = max(0, self._ended - 1)
            else:
                yield request

    def ended(self) -> None:
        """A request that may stand here has ended."""
        self._ended += 1
        if self._ended > _FEW and 2 * self._ended > len(self._heap):
            self._heap = [entry for entry in self._heap if entry[2].state is not RequestState.FINISHED]
            heapq.heapify(self._heap)
            self._ended = 0
