"""Which slot belongs to which caller's stream, and how far each slot is: arrays, so that a step costs per step.

The replica allots slots, the engine reports by slot, and `split` turns a step into one part a caller. Pure but for
the outlets it fills. Called by worker/replica.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from megatoken.access.lease import LeaseTerms
from megatoken.tokens.frames import U32, Column
from megatoken.tokens.outbox import FramePart
from megatoken.tracing import Span
from megatoken.worker.engines.engine import EngineRequest, EngineStep
from megatoken.worker.streams.outlet import Outlet

FIRST_SLOTS: Final = 256


@dataclass(slots=True)
class Running:
    """One request in the engine; its choices hold one slot each."""

    request: EngineRequest
    outlet: Outlet
    arrived_s: float
    choices_left: int
    failed: bool = False
    probe: bool = False  # the control plane's own; in no total
    cached_tokens: int = 0
    deadline: Any = None  # asyncio.TimerHandle
    lease: LeaseTerms | None = None
    lease_end: Any = None  # asyncio.TimerHandle
    generated: int = 0  # by the choices that ended
    span: Span | None = None


class StreamTable:
    """Slots and what is known of each. Arrays are indexed by slot."""

    def __init__(self) -> None:
        self.number = np.zeros(FIRST_SLOTS, U32)
        self.generated = np.zeros(FIRST_SLOTS, np.int64)
        self.last_s = np.zeros(FIRST_SLOTS, np.float64)  # when the slot's last token came; arrival before the first
        self._outlet = np.zeros(FIRST_SLOTS, np.int64)  # index into _outlets
        self._outlets: list[Outlet | None] = []
        self._outlet_index: dict[Outlet, int] = {}
        self._free_outlets: list[int] = []
        self._running: list[Running | None] = [None] * FIRST_SLOTS
        self._free = list(range(FIRST_SLOTS - 1, -1, -1))

    @property
    def live(self) -> int:
        """Slots in use."""
        return len(self._running) - len(self._free)

    def __getitem__(self, slot: int) -> Running:
        running = self._running[slot]
        if running is None:
            raise LookupError(f"slot {slot} is free")
        return running

    def all(self) -> Iterator[Running]:
        """Each running request once."""
        yield from {id(running): running for running in self._running if running is not None}.values()

    def holds(self, slot: int, running: Running) -> bool:
        """Whether the slot is still this request's."""
        return self._running[slot] is running

    def open(self, outlet: Outlet) -> None:
        """Registers a caller."""
        if self._free_outlets:
            index = self._free_outlets.pop()
            self._outlets[index] = outlet
        else:
            index = len(self._outlets)
            self._outlets.append(outlet)
        self._outlet_index[outlet] = index

    def close(self, outlet: Outlet) -> None:
        """Forgets a caller; its slots must be free."""
        index = self._outlet_index.pop(outlet)
        self._outlets[index] = None
        self._free_outlets.append(index)

    @property
    def outlets(self) -> list[Outlet]:
        """The callers."""
        return list(self._outlet_index)

    def allot(self, running: Running, first_number: int) -> None:
        """Gives each choice a slot and the stream numbers from `first_number` on."""
        choices = running.request.choices
        while len(self._free) < choices:
            self._grow()
        slots = tuple(self._free.pop() for _ in range(choices))
        running.request.slots = slots
        index = self._outlet_index[running.outlet]
        for choice, slot in enumerate(slots):
            number = (first_number + choice) % 2**32
            self._running[slot] = running
            self.number[slot] = number
            self.generated[slot] = 0
            self.last_s[slot] = running.arrived_s
            self._outlet[slot] = index
            running.outlet.slots[number] = slot

    def free(self, slot: int) -> None:
        """Takes a slot back after its stream's end."""
        running = self[slot]
        running.outlet.slots.pop(int(self.number[slot]), None)
        self._running[slot] = None
        self._free.append(slot)

    def advance(self, step: EngineStep, now_s: float) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
        """Counts a step's tokens; returns each slot's time since its last token, and which had their first."""
        slot = step.slot
        gaps = now_s - self.last_s[slot]
        self.last_s[slot] = now_s
        first = self.generated[slot] == 0
        self.generated[slot] += 1 if step.count is None else step.count
        return gaps, first

    def split(self, step: EngineStep, finishes: dict[Outlet, list[bytes]]) -> None:
        """Pushes the step to its callers, one part each, with its details and its encoded Finishes."""
        details: dict[Outlet, list[bytes]] = {}
        for slot, detail in step.details:
            detail.stream = int(self.number[slot])
            details.setdefault(self[slot].outlet, []).append(detail.SerializeToString())
        if len(step.slot):
            for outlet, number, count, token in self._columns(step):
                outlet.push(FramePart(number, count, token, details.pop(outlet, []), finishes.pop(outlet, [])))
        for outlet in {**details, **finishes}:
            outlet.push(FramePart(None, None, None, details.get(outlet, []), finishes.get(outlet, [])))

    def _columns(self, step: EngineStep) -> Iterator[tuple[Outlet, Column, Column | None, Column]]:
        number = self.number[step.slot]
        owner = self._outlet[step.slot]
        first = int(owner[0])
        if len(self._outlet_index) == 1 or (owner == first).all():
            yield self._at(first), number, step.count, step.token
            return
        order = np.argsort(owner, kind="stable")
        owner = owner[order]
        starts = [0, *(np.flatnonzero(np.diff(owner)) + 1).tolist()]
        number = number[order]
        if step.count is None:
            token = step.token[order]
            for start, end in zip(starts, [*starts[1:], len(owner)], strict=True):
                yield self._at(int(owner[start])), number[start:end], None, token[start:end]
            return
        count = step.count[order]
        token = step.token[_gather(step.count, order)]
        edges = np.concatenate(([0], np.cumsum(count, dtype=np.int64)))
        for start, end in zip(starts, [*starts[1:], len(owner)], strict=True):
            yield self._at(int(owner[start])), number[start:end], count[start:end], token[edges[start] : edges[end]]

    def _at(self, index: int) -> Outlet:
        outlet = self._outlets[index]
        if outlet is None:
            raise LookupError(f"caller {index} is gone, but the engine reports a slot of it")
        return outlet

    def _grow(self) -> None:
        old = len(self._running)
        self._running += [None] * old
        self._free = [*range(2 * old - 1, old - 1, -1), *self._free]
        for name in ("number", "generated", "last_s", "_outlet"):
            values = getattr(self, name)
            setattr(self, name, np.concatenate((values, np.zeros_like(values))))


def _gather(count: Column, order: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Where the tokens of each entry stand, for entries in a new order."""
    starts = np.concatenate(([0], np.cumsum(count, dtype=np.int64)[:-1]))
    counts = count[order].astype(np.int64)
    before = np.concatenate(([0], np.cumsum(counts)[:-1]))
    return np.repeat(starts[order] - before, counts) + np.arange(int(counts.sum()))
