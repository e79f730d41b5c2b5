"""The vector that the ranks of an epoch reduce, and the greetings from which each rank derives the same layout.

Decides which int64 is what. Ranks greet each other when an epoch forms and whenever one has a new model or replica; a
greeting lists its cells in order. A cell is WIDTH totals. The vector is

    [ranks, digest, changed] [workers' totals] [routers' totals] [cells of rank 0] [cells of rank 1] ...

and every rank fills its own cells, adds its sums to the two total columns, and leaves the rest zero. One sum-reduction
so gives the cluster's totals and gathers every row, and the two must agree: `decode` checks it each tick. Two ranks
with different ideas of the layout show in `digest`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

import numpy as np

from megatoken.worker.throughput.decide.ledger import WIDTH, NodeSums, Totals

WIRE_VERSION: Final = 2  # of this vector and of Greeting; members of a group must agree
RANKS, DIGEST, CHANGED, WORKERS, ROUTERS = 0, 1, 2, 3, 3 + WIDTH
HEAD: Final = 3 + 2 * WIDTH
MAX_DEPARTED: Final = 10_000  # cells; far more than nodes that leave a cluster for good

CellKind = Literal["routers", "model", "replica"]


class LayoutError(RuntimeError):
    """The reduced vector contradicts itself: ranks differ in layout or version."""


@dataclass(frozen=True, slots=True)
class Cell:
    """What one group of WIDTH totals counts. `ledger` is the identity of the counter directory it came from."""

    ledger: str
    kind: CellKind
    name: str  # of the model or replica; empty for routers
    node: str
    site: str


Departed = tuple[Cell, tuple[int, ...]]  # a cell of a node outside the group, and its last known totals


@dataclass(frozen=True, slots=True)
class ReplicaFacts:
    """What a row says about a replica beside its numbers."""

    model: str
    engine: str
    device_kind: str
    devices: int
    serving: bool  # counts in the efficiency's denominator


@dataclass(frozen=True, slots=True)
class Greeting:
    """What a rank tells the others about itself."""

    agent: str
    node: str
    site: str
    ledger: str
    models: tuple[str, ...] = ()
    replicas: tuple[tuple[str, ReplicaFacts], ...] = ()
    wire_version: int = WIRE_VERSION

    def cells(self) -> list[Cell]:
        """The rank's cells in vector order."""
        made = [Cell(self.ledger, "routers", "", self.node, self.site)]
        made += [Cell(self.ledger, "model", name, self.node, self.site) for name in self.models]
        made += [Cell(self.ledger, "replica", name, self.node, self.site) for name, _ in self.replicas]
        return made

    def pack(self) -> bytes:
        """As bytes for the other ranks."""
        return json.dumps(asdict(self), separators=(",", ":")).encode()

    @classmethod
    def unpack(cls, content: bytes) -> Greeting:
        """Reads what `pack` wrote. Raises LayoutError when it is not that, e.g. from another version."""
        try:
            raw: dict[str, Any] = json.loads(content)
            if raw["wire_version"] != WIRE_VERSION:
                raise LayoutError(
                    f"agent {raw.get('agent')} on node {raw.get('node')} speaks version {raw['wire_version']} of the "
                    f"throughput vector, this agent version {WIRE_VERSION}; install the same megatoken on both"
                )
            raw["models"] = tuple(raw["models"])
            raw["replicas"] = tuple((name, ReplicaFacts(**facts)) for name, facts in raw["replicas"])
            return cls(**raw)
        except (ValueError, KeyError, TypeError) as error:
            raise LayoutError(f"a rank's greeting does not parse: {error}") from error


@dataclass(slots=True)
class Layout:
    """The layout of one epoch, between two greetings. Build with `of`."""

    greetings: tuple[Greeting, ...]
    cells: list[Cell] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)  # first cell of each rank
    digest: int = 0
    _summed: tuple[Totals, Totals] = field(default_factory=lambda: (np.zeros(0, np.int64), np.zeros(0, np.int64)))

    @classmethod
    def of(cls, greetings: Sequence[Greeting]) -> Layout:
        """Derives the layout from the greetings in rank order; every rank gets the same."""
        layout = cls(tuple(greetings))
        for greeting in greetings:
            layout.starts.append(len(layout.cells))
            layout.cells += greeting.cells()
        text = "\n".join("\t".join((cell.ledger, cell.kind, cell.name)) for cell in layout.cells)
        layout.digest = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")
        kinds = np.array([cell.kind for cell in layout.cells])
        layout._summed = np.flatnonzero(kinds == "model"), np.flatnonzero(kinds == "routers")
        return layout

    @property
    def length(self) -> int:
        """int64 values in the vector."""
        return HEAD + WIDTH * len(self.cells)

    def encode(self, rank: int, sums: NodeSums, changed: bool) -> Totals:
        """The rank's contribution. What `sums` has and the greeting had not is in the totals from the next greeting."""
        vector = np.zeros(self.length, np.int64)
        greeting = self.greetings[rank]
        cells = vector[HEAD:].reshape(-1, WIDTH)[self.starts[rank] :]
        cells[0] = sums.routers
        place = 1
        for name in greeting.models:
            cells[place] = sums.models.get(name, 0)
            vector[WORKERS:ROUTERS] += cells[place]
            place += 1
        for name, _ in greeting.replicas:
            known = sums.replicas.get(name)
            if known is not None:
                cells[place] = known[1]
            place += 1
        vector[RANKS], vector[DIGEST], vector[CHANGED] = 1, self.digest, int(changed)
        vector[ROUTERS:HEAD] = sums.routers
        return vector

    def decode(self, vector: Totals) -> tuple[Totals, int]:
        """(the cells' totals, how many ranks have something new to tell). Raises LayoutError."""
        size = len(self.greetings)
        if len(vector) != self.length or vector[RANKS] != size or vector[DIGEST] != size * self.digest:
            raise LayoutError(
                f"the ranks do not agree on the layout: {int(vector[RANKS])} of {size} ranks, "
                f"{len(vector)} of {self.length} values, digest {int(vector[DIGEST])} for {size * self.digest}"
            )
        cells = vector[HEAD:].reshape(-1, WIDTH)
        for name, places, start in zip(("workers", "routers"), self._summed, (WORKERS, ROUTERS), strict=True):
            if (cells[places].sum(axis=0) != vector[start : start + WIDTH]).any():
                raise LayoutError(f"the sum of the {name}' rows differs from the reduced total")
        return cells, int(vector[CHANGED])


def greeting_of(base: Greeting, sums: NodeSums, serving: frozenset[str] | None) -> Greeting:
    """`base` (agent, node, site, ledger) with what the node has now."""
    replicas = tuple(
        (
            name,
            ReplicaFacts(
                writer.model,
                writer.engine,
                writer.device_kind,
                writer.devices,
                serving is None or name in serving,
            ),
        )
        for name, (writer, _) in sums.replicas.items()
    )
    return Greeting(base.agent, base.node, base.site, base.ledger, tuple(sums.models), replicas)


def pack_departed(cells: Sequence[Departed]) -> bytes:
    """Last known totals of nodes outside the group, for the other ranks: a newcomer has not seen them."""
    kept = [[asdict(cell), totals] for cell, totals in cells[:MAX_DEPARTED]]
    return json.dumps(kept, separators=(",", ":")).encode()


def unpack_departed(content: bytes) -> list[Departed]:
    """The inverse. Raises LayoutError."""
    try:
        return [(Cell(**cell), tuple(totals)) for cell, totals in json.loads(content)]
    except (ValueError, TypeError) as error:
        raise LayoutError(f"a rank's list of departed nodes does not parse: {error}") from error
