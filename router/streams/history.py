"""The tokens of every live stream so far, in pages of one pool, as a paged KV cache keeps keys.

A stream is a chain of pages linked from the newest back; each append is a handful of numpy operations for a whole
frame. Freed chains are walked together, many at once. Memory: 4 bytes a token plus at most one part-filled page a
stream. The core reads a chain when a stream moves to another replica, or when its delivery was held back.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from megatoken.router.streams.slots import SlotTable

PAGE: Final = 32  # tokens a page: 128 bytes; a stream wastes 64 on average
_SHIFT: Final = 5
_MASK: Final = PAGE - 1
_RECLAIM_CHAINS: Final = 256  # freed chains gathered before one walk over all of them

Index = npt.NDArray[np.integer[Any]]


class TokenPages:
    """Owns `slots.page`; positions come from `slots.generated`, which the caller moves on after each append."""

    def __init__(self, slots: SlotTable, pages: int = 1024) -> None:
        self._slots = slots
        self._tokens: npt.NDArray[np.uint32] = np.zeros(pages * PAGE, np.uint32)
        self._previous: npt.NDArray[np.int32] = np.full(pages, -1, np.int32)
        self._free: npt.NDArray[np.int32] = np.arange(pages, dtype=np.int32)  # a stack; [:_top] are free
        self._top = pages
        self._freed: list[int] = []  # heads of chains to walk

    @property
    def pages(self) -> int:
        return len(self._previous)

    @property
    def pages_in_use(self) -> int:
        """Pages that hold tokens of live streams; freed chains that were not walked yet count."""
        return len(self._previous) - self._top

    def append_each(self, slots: Index, position: Index, tokens: Index) -> None:
        """One token for each slot, no slot twice. `position` is slots.generated[slots]."""
        offset = position & _MASK
        fresh = slots[offset == 0]
        if len(fresh):
            self._new_pages(fresh)
        self._tokens[(self._slots.page[slots].astype(np.int64) << _SHIFT) + offset] = tokens

    def append_run(self, slot: int, position: int, tokens: npt.NDArray[np.uint32]) -> None:
        """Several tokens for one slot."""
        done = 0
        while done < len(tokens):
            offset = position & _MASK
            if offset == 0:
                self._new_pages(np.array([slot]))
            room = min(PAGE - offset, len(tokens) - done)
            at = (int(self._slots.page[slot]) << _SHIFT) + offset
            self._tokens[at : at + room] = tokens[done : done + room]
            done += room
            position += room

    def read(self, slot: int, start: int, stop: int) -> npt.NDArray[np.uint32]:
        """A copy of tokens start..stop of a live stream; `stop` is at most slots.generated[slot]."""
        if stop <= start:
            return np.empty(0, np.uint32)
        total = int(self._slots.generated[slot])
        page = int(self._slots.page[slot])
        for _ in range(((total - 1) >> _SHIFT) - ((stop - 1) >> _SHIFT)):
            page = int(self._previous[page])
        chain = [page]
        for _ in range(((stop - 1) >> _SHIFT) - (start >> _SHIFT)):
            page = int(self._previous[page])
            chain.append(page)
        chain.reverse()
        rows = self._tokens.reshape(-1, PAGE)[chain].ravel()
        first = start & _MASK
        return rows[first : first + stop - start]

    def free(self, slot: int) -> None:
        """Gives the stream's pages back."""
        page = int(self._slots.page[slot])
        if page >= 0:
            self._slots.page[slot] = -1
            self._freed.append(page)
            if len(self._freed) >= _RECLAIM_CHAINS:
                self._reclaim()

    def trim(self, slots: Index) -> None:
        """Gives back pages beyond what slots.generated says, after an append that did not come to its end."""
        for slot in np.unique(slots).tolist():
            chain = []
            page = int(self._slots.page[slot])
            while page >= 0:
                chain.append(page)
                page = int(self._previous[page])
            needed = (int(self._slots.generated[slot]) + PAGE - 1) >> _SHIFT
            for surplus in chain[: len(chain) - needed]:
                self._slots.page[slot] = self._previous[surplus]
                self._free[self._top] = surplus
                self._top += 1

    def move(self, source: int, target: int) -> None:
        """The chain now belongs to another slot."""
        self._slots.page[target] = self._slots.page[source]
        self._slots.page[source] = -1

    def _new_pages(self, slots: Index) -> None:
        need = len(slots)
        if self._top < need and self._freed:
            self._reclaim()
        while self._top < need:
            self._grow()
        self._top -= need
        pages = self._free[self._top : self._top + need].copy()
        self._previous[pages] = self._slots.page[slots]
        self._slots.page[slots] = pages

    def _reclaim(self) -> None:
        chain = np.array(self._freed, np.int32)
        self._freed.clear()
        while len(chain):
            self._free[self._top : self._top + len(chain)] = chain
            self._top += len(chain)
            chain = self._previous[chain]
            chain = chain[chain >= 0]

    def _grow(self) -> None:
        old = len(self._previous)
        more = max(old // 2, 1024)
        self._tokens = np.concatenate([self._tokens, np.zeros(more * PAGE, np.uint32)])
        self._previous = np.concatenate([self._previous, np.full(more, -1, np.int32)])
        free = np.empty(old + more, np.int32)
        free[: self._top] = self._free[: self._top]
        free[self._top : self._top + more] = np.arange(old, old + more, dtype=np.int32)
        self._free = free
        self._top += more
