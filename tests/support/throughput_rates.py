"""A cluster whose agents' totals a test sets, tick by tick."""

from __future__ import annotations

import numpy as np

from megatoken.counters import INDEX
from megatoken.worker.throughput.decide.layout import Departed, Greeting, Layout, ReplicaFacts
from megatoken.worker.throughput.decide.ledger import WIDTH, NodeSums, Totals, Writer
from megatoken.worker.throughput.decide.rates import ClusterRates, RateRow

TOKENS = INDEX["generated_tokens"]


def facts(engine: str = "vllm", serving: bool = True, kind: str = "MI355X", model: str = "m") -> ReplicaFacts:
    return ReplicaFacts(model, engine, kind, 1, serving)


def greeting(rank: int, replica: ReplicaFacts | None = None, site: str = "", ledger: str = "") -> Greeting:
    named = ((f"r{rank}", replica or facts()),)
    return Greeting(f"agent-{rank}", f"node-{rank}", site, ledger or f"ledger-{rank}", ("m",), named)


def made(tokens: int) -> Totals:
    values = np.zeros(WIDTH, np.int64)
    values[TOKENS] = tokens
    values[INDEX["prompt_tokens"]] = 2 * tokens
    values[INDEX["cached_tokens"]] = tokens // 2
    return values


class Cluster:
    """Feeds Books as an agent would."""

    def __init__(self, rates: dict[str, float] | None = None) -> None:
        self.rates = ClusterRates(rates or {})
        self.now = 1000.0
        self.layout = Layout.of([])
        self.ranks: list[int] = []

    def arrange(self, *greetings: Greeting, departed: list[Departed] | None = None) -> None:
        self.layout = Layout.of(greetings)
        self.ranks = [int(g.agent.split("-")[1]) for g in greetings]
        self.rates.learn(departed or [], self.now)
        self.rates.arrange(self.layout)

    def tick(self, after_s: float, *tokens: int) -> None:
        self.now += after_s
        vector = np.zeros(self.layout.length, np.int64)
        for place, (rank, count) in enumerate(zip(self.ranks, tokens, strict=True)):
            writer = Writer("worker", f"r{rank}", 1, "m")
            sums = NodeSums(made(count), {"m": made(count)}, {f"r{rank}": (writer, made(count))})
            vector += self.layout.encode(place, sums, False)
        self.rates.update(self.layout.decode(vector)[0], self.now)

    def row(self, kind: str, name: str) -> RateRow:
        return next(row for row in self.rates.rows() if (row.kind, row.name) == (kind, name))

    def rate(self, kind: str = "cluster", name: str = "cluster", window: int = 0) -> float:
        return self.row(kind, name).rates[window].generated
