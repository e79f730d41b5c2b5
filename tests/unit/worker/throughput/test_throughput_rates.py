"""What the cluster counted and how fast, over ranks that come and go."""

from __future__ import annotations

import numpy as np
import pytest

from megatoken.counters import INDEX
from megatoken.worker.throughput.decide.layout import Cell, Departed, Greeting, Layout, ReplicaFacts
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


def test_rates_over_each_window_are_exact_at_a_steady_rate() -> None:
    cluster = Cluster()
    cluster.arrange(greeting(0), greeting(1))
    for step in range(400):
        cluster.tick(1.0, 100 * step, 50 * step)
    for window in range(4):
        assert cluster.rate(window=window) == pytest.approx(150)
        assert cluster.rate("node", "node-1", window) == pytest.approx(50)
        assert cluster.rate("replica", "r0", window) == pytest.approx(100)
    rate = cluster.row("model", "m").rates[0]
    assert (rate.prompt, rate.cached) == (pytest.approx(300), pytest.approx(75))


def test_windows_tell_a_burst_from_the_average() -> None:
    cluster = Cluster()
    cluster.arrange(greeting(0))
    total = 0
    for step in range(301):
        total += 100 if step < 290 else 1000
        cluster.tick(1.0, total)
    rates = [cluster.rate(window=window) for window in range(4)]
    assert rates[0] == pytest.approx(1000)
    assert rates[1] == pytest.approx(1000)
    assert rates[2] == pytest.approx((49 * 100 + 11 * 1000) / 60, rel=0.1)
    assert rates[3] == pytest.approx((289 * 100 + 11 * 1000) / 300, rel=0.05)


def test_an_uneven_tick_does_not_bend_the_rate() -> None:
    cluster = Cluster()
    cluster.arrange(greeting(0))
    total = 0.0
    for wait in (1.0, 1.0, 2.7, 0.4, 1.0):
        total += 100 * wait
        cluster.tick(wait, int(total))
    assert cluster.rate(window=0) == pytest.approx(100, rel=0.02)


def test_a_node_that_joins_with_old_totals_makes_no_spike() -> None:
    cluster = Cluster()
    cluster.arrange(greeting(0))
    for step in range(5):
        cluster.tick(1.0, 100 * step)
    cluster.arrange(greeting(0), greeting(1))
    cluster.tick(1.0, 500, 1_000_000)
    assert cluster.rate() == pytest.approx(100)
    assert cluster.row("cluster", "cluster").workers[TOKENS] == 1_000_500
    cluster.tick(1.0, 600, 1_000_050)
    assert cluster.rate() == pytest.approx(150)


def test_a_replica_younger_than_the_window_is_measured_over_its_own_life() -> None:
    cluster = Cluster()
    cluster.arrange(greeting(0))
    for step in range(30):
        cluster.tick(1.0, 100 * step)
    cluster.arrange(greeting(0), greeting(1))
    for step in range(30, 35):
        cluster.tick(1.0, 100 * step, 50 * (step - 30))
    assert cluster.rate("replica", "r1", 2) == pytest.approx(50)
    assert cluster.rate("replica", "r0", 2) == pytest.approx(100)
    assert cluster.rate(window=2) == pytest.approx((34 * 100 + 200) / 34)


def test_a_node_that_left_still_counts_and_its_return_is_no_spike() -> None:
    cluster = Cluster()
    cluster.arrange(greeting(0), greeting(1))
    for step in range(5):
        cluster.tick(1.0, 100 * step, 10 * step)
    cluster.arrange(greeting(1))
    for step in range(5, 10):
        cluster.tick(1.0, 10 * step)
    assert cluster.row("cluster", "cluster").workers[TOKENS] == 400 + 90
    assert cluster.rate() == pytest.approx(10)
    cluster.arrange(greeting(1), greeting(0))
    cluster.tick(1.0, 100, 1000)
    assert cluster.row("cluster", "cluster").workers[TOKENS] == 1100
    assert cluster.rate() == pytest.approx(10 + 100)  # 600 tokens over the 6 s that it was out of sight
    assert cluster.rate(window=1) == pytest.approx(110, rel=0.02)


def test_a_newcomer_learns_of_nodes_that_left_and_nothing_goes_backwards() -> None:
    old = Cluster()
    old.arrange(greeting(0), greeting(1))
    old.tick(1.0, 500, 7)
    layout = Layout.of([greeting(1), greeting(2)])
    known = old.rates.departed(layout)
    assert {cell.kind for cell, _ in known} == {"routers", "model"}
    new = Cluster()
    new.arrange(greeting(1), greeting(2), departed=known)
    new.tick(1.0, 9, 0)
    row = new.row("cluster", "cluster")
    assert row.workers[TOKENS] == 509
    assert row.routers is not None
    assert row.routers[TOKENS] == 509
    assert new.rate() == 0.0
    new.tick(1.0, 19, 0)
    assert new.rate() == pytest.approx(10)


def test_a_node_that_lost_its_files_adds_to_what_it_had() -> None:
    cluster = Cluster()
    cluster.arrange(greeting(0))
    cluster.tick(1.0, 500)
    cluster.arrange(greeting(0, ledger="after-the-disk-was-lost"))
    cluster.tick(1.0, 3)
    assert cluster.row("node", "node-0").workers[TOKENS] == 503


def test_two_ranks_with_one_directory_count_once() -> None:
    cluster = Cluster()
    cluster.arrange(greeting(0, ledger="same"), greeting(0, ledger="same"))
    cluster.tick(1.0, 500, 500)
    assert cluster.row("cluster", "cluster").workers[TOKENS] == 500


def test_sites_are_summed_where_they_are_declared() -> None:
    cluster = Cluster()
    cluster.arrange(greeting(0, site="paris"), greeting(1, site="oslo"), greeting(2, site="oslo"))
    cluster.tick(1.0, 1, 2, 4)
    assert cluster.row("site", "oslo").workers[TOKENS] == 6
    assert [row.name for row in cluster.rates.rows() if row.kind == "site"] == ["oslo", "paris"]


def test_efficiency_is_the_rate_over_what_the_replicas_make_alone() -> None:
    cluster = Cluster({"m@MI355X": 100.0, "MI300X": 40.0})
    cluster.arrange(greeting(0), greeting(1, facts(kind="MI300X")), greeting(2, facts(serving=False)))
    for step in range(12):
        cluster.tick(1.0, 90 * step, 40 * step, 0)
    assert cluster.row("cluster", "cluster").efficiency == pytest.approx(130 / 140)
    assert cluster.row("replica", "r0").efficiency == pytest.approx(0.9)
    assert cluster.row("replica", "r2").efficiency == 0.0


def test_efficiency_is_not_stated_when_a_stand_alone_rate_is_missing() -> None:
    cluster = Cluster({"MI355X": 100.0})
    cluster.arrange(greeting(0), greeting(1, facts(kind="unheard-of")))
    for step in range(12):
        cluster.tick(1.0, 90 * step, 40 * step)
    assert cluster.row("cluster", "cluster").efficiency == 0.0
    assert cluster.row("node", "node-0").efficiency == pytest.approx(0.9)


def test_simulated_replicas_are_named_so() -> None:
    cluster = Cluster()
    cluster.arrange(greeting(0, facts(engine="simulated")))
    cluster.tick(1.0, 1)
    assert cluster.row("replica", "r0").engine == "simulated"


def test_before_the_second_tick_every_rate_is_zero() -> None:
    cluster = Cluster()
    assert cluster.rates.cluster().workers.tolist() == [0] * WIDTH
    cluster.arrange(greeting(0))
    assert cluster.rate() == 0.0
    cluster.tick(1.0, 5)
    assert cluster.rate() == 0.0


def test_history_is_bounded_whatever_the_tick() -> None:
    cluster = Cluster()
    cluster.arrange(greeting(0))
    for step in range(5000):
        cluster.tick(0.05, step)
    points = len(cluster.rates._fine) + len(cluster.rates._coarse)
    assert points < 350
    assert cluster.rate(window=3) == pytest.approx(20, rel=0.01)


def test_cells_of_a_thousand_nodes_update_in_milliseconds() -> None:
    import time

    cluster = Cluster()
    cluster.arrange(*(greeting(rank) for rank in range(1000)))
    cells = np.ones((len(cluster.layout.cells), WIDTH), np.int64)
    cluster.rates.update(cells, 1.0)
    started = time.process_time()
    for step in range(10):
        cluster.rates.update(cells * step, 2.0 + step)
    assert (time.process_time() - started) / 10 < 0.05


def test_a_cell_is_a_value() -> None:
    assert Cell("l", "model", "m", "n", "s") == Cell("l", "model", "m", "n", "s")
