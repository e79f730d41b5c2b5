"""What the cluster counted and how fast: the result of every reduction so far, per cell, and its windows.

Decides what a row says. Cells live in one growing matrix; a cell keeps its highest totals, so nothing goes backwards
when ranks come and go, and cells of nodes that left still count. Rates are taken per cell against the cell's own first
value: a node that joins with a day's totals makes no spike. Time is the agent's monotonic clock, so a jump of the wall
clock moves no rate. Pure; the agent feeds it and the server reads it.

A tick costs O(cells) in numpy. The rows, which cost Python per row, are made only when somebody asks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from megatoken.counters import INDEX
from megatoken.worker.throughput.decide.layout import Cell, Departed, Layout, ReplicaFacts
from megatoken.worker.throughput.decide.ledger import WIDTH, Totals

WINDOWS_S: Final = (1, 10, 60, 300)
FINE_S: Final = 12.0  # history at every tick
COARSE_STEP_S: Final = 5.0  # and one point in this many seconds for the long windows
MAX_FINE: Final = 1024
MIN_SPAN_S: Final = 0.01  # of a row in its first tick, which has counted nothing yet
TOKENS: Final = [INDEX["generated_tokens"], INDEX["prompt_tokens"], INDEX["cached_tokens"]]
EFFICIENCY_WINDOW_S: Final = 10
Key = tuple[str, str, str]  # ledger, kind, name
Indices = npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Rate:
    """Tokens/s over one window. `cached` is the part of `prompt` that the prefix cache answered."""

    seconds: int
    generated: float
    prompt: float
    cached: float


@dataclass(frozen=True, slots=True)
class RateRow:
    """One line of a sample."""

    kind: str  # cluster, site, node, model, replica
    name: str
    workers: Totals
    routers: Totals | None
    rates: tuple[Rate, ...]
    efficiency: float
    engine: str


@dataclass(slots=True)
class _Group:
    """The cells behind a row."""

    workers: list[int] = field(default_factory=list)
    routers: list[int] = field(default_factory=list)
    standalone: float = 0.0
    unknown: bool = False  # a replica without a stand-alone rate: no efficiency can be stated
    engine: str = ""


class ClusterRates:
    """All totals that this agent knows of."""

    def __init__(self, standalone_rates: Mapping[str, float]) -> None:
        self._rates = standalone_rates
        self._cells: list[Cell] = []
        self._index: dict[Key, int] = {}
        self._totals = np.zeros((0, WIDTH), np.int64)
        self._first = np.zeros((0, len(TOKENS)), np.int64)
        self._seen = np.zeros(0, np.float64)  # when each cell was last reduced
        self._born = np.zeros(0, np.float64)  # and first
        self._fine: deque[tuple[float, Totals]] = deque(maxlen=MAX_FINE)
        self._coarse: deque[tuple[float, Totals]] = deque(maxlen=int(WINDOWS_S[-1] / COARSE_STEP_S) + 2)
        self._places: Indices = np.zeros(0, np.intp)
        self._present: frozenset[str] = frozenset()
        self._facts: dict[str, ReplicaFacts] = {}
        self._groups: dict[tuple[str, str], _Group] = {}

    def learn(self, departed: Iterable[Departed], now: float) -> None:
        """Takes what other ranks know of nodes that left. Call before `arrange`."""
        told = list(departed)
        for place, (_, totals) in zip(self._places_of(cell for cell, _ in told), told, strict=True):
            self._totals[place] = np.maximum(self._totals[place], totals)
            if self._first[place, 0] < 0:
                self._first[place] = self._totals[place, TOKENS]
                self._seen[place] = self._born[place] = now

    def arrange(self, layout: Layout) -> None:
        """Takes a new layout: its cells, and its replicas' facts."""
        self._present = frozenset(greeting.ledger for greeting in layout.greetings)
        self._facts = {name: facts for greeting in layout.greetings for name, facts in greeting.replicas}
        self._places = self._places_of(layout.cells)
        self._group()

    def update(self, cells: Totals, now: float) -> None:
        """Takes the totals of a complete tick, in the order of the layout, at `now` (monotonic seconds)."""
        before = self._totals[:, TOKENS]
        np.maximum.at(self._totals, self._places, cells)
        fresh = self._places[self._first[self._places, 0] < 0]
        self._first[fresh], self._born[fresh] = self._totals[fresh][:, TOKENS], now
        if self._fine:
            returned = self._places[self._seen[self._places] < self._fine[-1][0]]
            self._fill_gap(np.setdiff1d(returned, fresh), before, now)
        self._seen[self._places] = now
        point = (now, self._totals[:, TOKENS])
        while self._fine and now - self._fine[0][0] > FINE_S:
            self._fine.popleft()
        self._fine.append(point)
        if not self._coarse or now - self._coarse[-1][0] >= COARSE_STEP_S:
            self._coarse.append(point)

    def _fill_gap(self, places: Indices, before: Totals, now: float) -> None:
        """Spreads evenly what nodes counted while they were out of the group: no spike at their return."""
        if not len(places):
            return
        gained = self._totals[places][:, TOKENS] - before[places]
        since = self._seen[places]
        for at, tokens in (*self._coarse, *self._fine):
            held = (places < len(tokens)) & (since < at)
            share = ((at - since) / (now - since))[:, None]
            tokens[places[held]] = (before[places] + gained * share).astype(np.int64)[held]

    def departed(self, layout: Layout) -> list[Departed]:
        """Last known totals of nodes outside the group of `layout`, for its other ranks."""
        present = {greeting.ledger for greeting in layout.greetings}
        return [
            (cell, tuple(self._totals[place].tolist()))
            for place, cell in enumerate(self._cells)
            if cell.ledger not in present and cell.kind != "replica"
        ]

    def rows(self) -> list[RateRow]:
        """Cluster first, then sites, nodes, models and replicas by name."""
        spans = [self._span(window) for window in WINDOWS_S]
        return [self._row(kind, name, group, spans) for (kind, name), group in self._groups.items()]

    def cluster(self) -> RateRow:
        """The cluster's row alone."""
        spans = [self._span(window) for window in WINDOWS_S]
        return self._row("cluster", "cluster", self._groups.get(("cluster", "cluster"), _Group()), spans)

    def _places_of(self, cells: Iterable[Cell]) -> Indices:
        """Where each cell is in the matrix; unknown ones get a place at its end."""
        places = []
        for cell in cells:
            place = self._index.setdefault((cell.ledger, cell.kind, cell.name), len(self._cells))
            self._cells[place : place + 1] = [cell]
            places.append(place)
        new = len(self._cells) - len(self._totals)
        self._totals = np.vstack([self._totals, np.zeros((new, WIDTH), np.int64)])
        self._first = np.vstack([self._first, np.full((new, len(TOKENS)), -1, np.int64)])
        self._seen = np.append(self._seen, np.full(new, -np.inf))
        self._born = np.append(self._born, np.full(new, np.inf))
        return np.array(places, np.intp)

    def _group(self) -> None:
        """Which cells make which row. Replicas have a row while a rank lists them; all else for good."""
        groups: dict[tuple[str, str], _Group] = {("cluster", "cluster"): _Group()}
        for place, cell in sorted(enumerate(self._cells), key=lambda pair: (pair[1].name, pair[1].node)):
            owners = [("cluster", "cluster"), ("node", cell.node)]
            owners += [("site", cell.site)] if cell.site else []
            if cell.kind == "routers":
                for owner in owners:
                    groups.setdefault(owner, _Group()).routers.append(place)
            elif cell.kind == "model":
                for owner in [*owners, ("model", cell.name)]:
                    groups.setdefault(owner, _Group()).workers.append(place)
            elif cell.name in self._facts and cell.ledger in self._present:
                facts = self._facts[cell.name]
                group = groups.setdefault(("replica", cell.name), _Group())
                group.workers.append(place)
                group.engine = facts.engine
                if facts.serving:
                    rate = self._standalone(facts)
                    for owner in [*owners, ("model", facts.model), ("replica", cell.name)]:
                        owned = groups.setdefault(owner, _Group())
                        owned.standalone += rate or 0.0
                        owned.unknown |= rate is None
        order = {"cluster": 0, "site": 1, "node": 2, "model": 3, "replica": 4}
        self._groups = dict(sorted(groups.items(), key=lambda pair: (order[pair[0][0]], pair[0][1])))

    def _standalone(self, facts: ReplicaFacts) -> float | None:
        for name in (f"{facts.model}@{facts.device_kind}", facts.model, facts.device_kind):
            if name in self._rates:
                return self._rates[name]
        return None

    def _span(self, window_s: float) -> tuple[float, Totals] | None:
        """(seconds, tokens per cell) since the point nearest to `window_s` ago; None before the second tick."""
        if not self._fine:
            return None
        now, newest = self._fine[-1]
        points: Iterable[tuple[float, Totals]] = (*self._coarse, *self._fine)
        earlier = [point for point in points if point[0] < now]
        if not earlier:
            return None
        at, then = min(earlier, key=lambda point: abs(now - window_s - point[0]))
        known = len(then)
        base = np.vstack([then, self._first[known : len(newest)]]) if known < len(newest) else then
        return now - at, np.maximum(newest - np.maximum(base, self._first[: len(newest)]), 0)

    def _row(self, kind: str, name: str, group: _Group, spans: Sequence[tuple[float, Totals] | None]) -> RateRow:
        workers = self._totals[group.workers].sum(axis=0)
        routers = self._totals[group.routers].sum(axis=0) if kind in ("cluster", "node", "site") else None
        rates = []
        for window, span in zip(WINDOWS_S, spans, strict=True):
            if span is None:
                rates.append(Rate(window, 0.0, 0.0, 0.0))
            else:
                seconds, tokens = span
                inside = [place for place in group.workers if place < len(tokens)]
                if inside:  # what is younger than the window is measured over its own life
                    seconds = min(seconds, self._fine[-1][0] - float(self._born[inside].min()))
                generated, prompt, cached = (tokens[inside].sum(axis=0) / max(seconds, MIN_SPAN_S)).tolist()
                rates.append(Rate(window, generated, prompt, cached))
        efficiency = 0.0
        if group.standalone and not group.unknown:
            efficiency = rates[WINDOWS_S.index(EFFICIENCY_WINDOW_S)].generated / group.standalone
        return RateRow(kind, name, workers, routers, tuple(rates), efficiency, group.engine)
