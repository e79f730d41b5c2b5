"""The table of live streams: one slot per request that a replica has, as numpy columns.

A slot's number is the stream number that the router uses towards the worker. It is taken when a request is placed and
freed when the worker says that it ended, or its session is gone. Between a cancel and the worker's word the slot is
an orphan: it belongs to nobody, and what still arrives for it is dropped.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

NOBODY: Final = -1  # sink of an orphan, and of a free slot
DIRECT: Final = -2  # tokens go to the request's own object, one by one (Generate, held delivery, replay)

Int32 = npt.NDArray[np.int32]
Slots = npt.NDArray[np.integer[Any]]


class SlotTable:
    """Columns by slot. `owner[slot]` is the request object of a live slot, None for an orphan or a free one.

    sink: index of the client session that gets the tokens, or NOBODY or DIRECT. stream: the client's number.
    replica: index of the replica that has it, -1 when free. generated: tokens so far, earlier replicas included.
    last_s: when its last token came. page, first_page: see history.
    """

    def __init__(self, size: int = 1024) -> None:
        self.size = size
        self.sink: Int32 = np.full(size, NOBODY, np.int32)
        self.stream: npt.NDArray[np.uint32] = np.zeros(size, np.uint32)
        self.replica: Int32 = np.full(size, -1, np.int32)
        self.generated: npt.NDArray[np.int64] = np.zeros(size, np.int64)
        self.last_s: npt.NDArray[np.float64] = np.zeros(size, np.float64)
        self.page: Int32 = np.full(size, -1, np.int32)
        self.rank: npt.NDArray[np.int32] = np.zeros(size, np.int32)  # scratch: finds a slot that a frame names twice
        self.owner: list[Any] = [None] * size
        self._free = list(range(size - 1, -1, -1))

    @property
    def taken(self) -> int:
        """Slots in use, orphans included."""
        return self.size - len(self._free)

    def take(self, replica: int, sink: int, stream: int, owner: object, now: float) -> int:
        """A fresh slot."""
        if not self._free:
            self._grow()
        slot = self._free.pop()
        self.sink[slot] = sink
        self.stream[slot] = stream
        self.replica[slot] = replica
        self.generated[slot] = 0
        self.last_s[slot] = now
        self.page[slot] = -1
        self.owner[slot] = owner
        return slot

    def orphan(self, slot: int, now: float) -> None:
        """The request is gone, the worker does not know yet. `last_s` tells since when."""
        self.last_s[slot] = now
        self.sink[slot] = NOBODY
        self.owner[slot] = None

    def free(self, slot: int) -> None:
        if self.replica[slot] < 0:
            raise RuntimeError(f"slot {slot} is free already")
        self.sink[slot] = NOBODY
        self.replica[slot] = -1
        self.owner[slot] = None
        self._free.append(slot)

    def orphans(self, before_s: float) -> Slots:
        """Orphans since before that time."""
        return np.flatnonzero((self.replica >= 0) & (self.sink == NOBODY) & (self.last_s < before_s))

    def of_replica(self, replica: int) -> list[int]:
        """Every slot that the replica has, orphans included."""
        found: list[int] = np.flatnonzero(self.replica == replica).tolist()
        return found

    def _grow(self) -> None:
        old, self.size = self.size, self.size * 2
        for name, fill in (
            ("sink", NOBODY), ("stream", 0), ("replica", -1), ("generated", 0), ("last_s", 0), ("page", -1), ("rank", 0)
        ):  # fmt: skip
            column = getattr(self, name)
            grown = np.full(self.size, fill, column.dtype)
            grown[:old] = column
            setattr(self, name, grown)
        self.owner.extend([None] * old)
        self._free.extend(range(self.size - 1, old - 1, -1))
