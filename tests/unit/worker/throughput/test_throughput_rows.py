"""Which rows a sample has, in which order, and what each says beside its rates."""

from __future__ import annotations

import pytest

from megatoken.worker.throughput.decide.layout import Greeting
from tests.support.throughput_rates import TOKENS, Cluster, facts, greeting


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


def test_rows_come_as_cluster_sites_nodes_models_and_replicas_by_name() -> None:
    cluster = Cluster()
    last = Greeting("agent-1", "a-node", "z-site", "l1", ("b", "a-model"), (("a-replica", facts()),))
    cluster.arrange(Greeting("agent-0", "node-0", "a-site", "l0", ("m",), (("r0", facts()),)), last)
    cluster.tick(1.0, 1, 2)
    rows = cluster.rates.rows()
    assert [(row.kind, row.name) for row in rows] == [
        ("cluster", "cluster"),
        ("site", "a-site"),
        ("site", "z-site"),
        ("node", "a-node"),
        ("node", "node-0"),
        ("model", "a-model"),
        ("model", "b"),
        ("model", "m"),
        ("replica", "a-replica"),
        ("replica", "r0"),
    ]
    assert {row.kind for row in rows if row.routers is None} == {"model", "replica"}


def test_a_node_without_a_site_makes_no_site_row() -> None:
    cluster = Cluster()
    cluster.arrange(greeting(0))
    kinds = [row.kind for row in cluster.rates.rows()]
    assert kinds == ["cluster", "node", "model", "replica"]


def test_a_replica_has_a_row_only_while_its_own_node_lists_it() -> None:
    cluster = Cluster()
    cluster.arrange(greeting(0))
    cluster.tick(1.0, 70)
    cluster.arrange(Greeting("agent-0", "node-0", "", "ledger-0", ("m",)))
    assert not [row for row in cluster.rates.rows() if row.kind == "replica"]
    cluster.arrange(Greeting("agent-1", "node-1", "", "ledger-1", ("m",), (("r0", facts()),)))
    assert cluster.row("replica", "r0").workers[TOKENS] == 0


@pytest.mark.parametrize("unknown", [0, 1])
def test_one_unknown_stand_alone_rate_is_enough_to_state_no_efficiency(unknown: int) -> None:
    cluster = Cluster({"MI355X": 100.0})
    kinds = ["MI355X", "MI355X"]
    kinds[unknown] = "unheard-of"
    cluster.arrange(greeting(0, facts(kind=kinds[0])), greeting(1, facts(kind=kinds[1])))
    for step in range(12):
        cluster.tick(1.0, 90 * step, 40 * step)
    assert cluster.row("cluster", "cluster").efficiency == 0.0


def test_a_stand_alone_rate_of_zero_states_no_efficiency() -> None:
    cluster = Cluster({"m": 0.0})
    cluster.arrange(greeting(0))
    for step in range(12):
        cluster.tick(1.0, 90 * step)
    assert cluster.row("cluster", "cluster").efficiency == 0.0
    assert cluster.row("replica", "r0").efficiency == 0.0


@pytest.mark.parametrize(
    ("rates", "efficiency"),
    [
        ({"m@MI355X": 30.0, "m": 60.0, "MI355X": 90.0}, 3.0),
        ({"m": 60.0, "MI355X": 90.0}, 1.5),
        ({"MI355X": 90.0}, 1.0),
    ],
)
def test_the_most_particular_stand_alone_rate_counts(rates: dict[str, float], efficiency: float) -> None:
    cluster = Cluster(rates)
    cluster.arrange(greeting(0))
    for step in range(12):
        cluster.tick(1.0, 90 * step)
    assert cluster.row("replica", "r0").efficiency == pytest.approx(efficiency)
