"""What one node counted: monotonic totals of every worker and router that ever wrote a counter file there.

Decides what counts. Totals are kept by (kind, id, incarnation), so a restarted writer adds to its predecessor's instead
of replacing them, and a dead one's stay. A total never goes down: a counter that does is named once a fall, and the
highest value stays until it is passed again, so that nothing is counted twice. Reads no files and no clock; the agent
calls `record` once a tick.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from megatoken.counters import NAMES

WIDTH: Final = len(NAMES)
SHOWN_S: Final = 300.0  # a replica that made nothing for as long as the longest window leaves the rows
MAX_TEXT: Final = 256
Totals = npt.NDArray[np.int64]  # WIDTH values in the order of NAMES, or rows of them
Kind = Literal["worker", "router"]


@dataclass(frozen=True, slots=True)
class Writer:
    """Who writes a counter file: its header."""

    kind: Kind
    id: str
    incarnation: int
    model: str = ""
    engine: str = ""
    device_kind: str = ""
    devices: int = 1

    @classmethod
    def of_header(cls, header: dict[str, object]) -> Writer:
        """Checks a counter file's header. Raises ValueError that names the field."""
        kind, name, incarnation = header.get("kind"), header.get("id"), header.get("incarnation")
        if kind not in ("worker", "router"):
            raise ValueError(f"kind is {kind!r}; it must be worker or router")
        if not isinstance(name, str) or not 0 < len(name) <= MAX_TEXT:
            raise ValueError(f"id is {name!r}; it must be a text of 1 to {MAX_TEXT} characters")
        if not isinstance(incarnation, int):
            raise ValueError(f"incarnation is {incarnation!r}; it must be a number")
        texts = [str(header.get(field) or "")[:MAX_TEXT] for field in ("model", "engine", "device_kind")]
        devices = header.get("devices", 1)
        if isinstance(devices, (list, tuple)):  # rank placements
            devices = len(devices)
        model, engine, device_kind = texts
        count = devices if isinstance(devices, int) else 1
        return cls(kind, name, incarnation, model, engine, device_kind, count)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Fall:
    """A counter that went backwards."""

    writer: Writer
    name: str
    was: int
    now: int

    def __str__(self) -> str:
        """One sentence for the log."""
        return (
            f"{self.name} of {self.writer.kind} {self.writer.id} (incarnation {self.writer.incarnation}) "
            f"went backwards from {self.was} to {self.now}; {self.was} is kept"
        )


@dataclass(slots=True)
class Entry:
    """The totals of one incarnation."""

    writer: Writer
    highest: Totals
    last: Totals
    changed_s: float


@dataclass(frozen=True, slots=True)
class NodeSums:
    """The node's part of the sum: routers together, workers by model, and each replica that is worth a row."""

    routers: Totals
    models: dict[str, Totals]
    replicas: dict[str, tuple[Writer, Totals]]  # the newest incarnation's writer, all incarnations' totals


class NodeLedger:
    """The totals of one node."""

    def __init__(self) -> None:
        self._entries: dict[tuple[str, str, int], Entry] = {}
        self.falls = 0

    def record(self, readings: Iterable[tuple[Writer, Totals]], now: float) -> list[Fall]:
        """Takes what the counter files say at `now` (monotonic seconds); returns the counters that fell."""
        fallen: list[Fall] = []
        for writer, totals in readings:
            key = (writer.kind, writer.id, writer.incarnation)
            entry = self._entries.get(key)
            if entry is None:
                first = np.maximum(totals, 0)
                self._entries[key] = Entry(writer, first, totals.copy(), now)
                below = np.flatnonzero(totals < 0)
            else:
                below = np.flatnonzero(totals < entry.last)
                if (totals > entry.highest).any():
                    entry.highest = np.maximum(entry.highest, totals)
                    entry.changed_s = now
                last, entry.last = entry.last, totals.copy()
            for index in below.tolist():
                was = 0 if entry is None else int(last[index])
                fallen.append(Fall(writer, NAMES[index], was, int(totals[index])))
        self.falls += len(fallen)
        return fallen

    def sums(self, now: float, serving: frozenset[str] | None) -> NodeSums:
        """Everything counted so far. `serving` holds the replicas that the controller lists; None: not known.

        Replicas that serve or moved within SHOWN_S get a row; every incarnation counts in its model.
        """
        routers = np.zeros(WIDTH, np.int64)
        models: dict[str, Totals] = {}
        replicas: dict[str, tuple[Writer, Totals]] = {}
        shown: set[str] = set()
        for entry in self._entries.values():
            writer = entry.writer
            if writer.kind == "router":
                routers += entry.highest
                continue
            models[writer.model] = models.get(writer.model, 0) + entry.highest
            newest, total = replicas.get(writer.id, (writer, np.zeros(WIDTH, np.int64)))
            newer = writer if writer.incarnation > newest.incarnation else newest
            replicas[writer.id] = (newer, total + entry.highest)
            if (serving is not None and writer.id in serving) or now - entry.changed_s < SHOWN_S:
                shown.add(writer.id)
        return NodeSums(
            routers,
            {name: models[name] for name in sorted(models)},
            {name: replicas[name] for name in sorted(shown)},
        )
