"""What the cluster counted and how fast, over ranks that come and go."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from megatoken.worker.throughput.decide.layout import Cell, Greeting, Layout
from megatoken.worker.throughput.decide.ledger import WIDTH
from megatoken.worker.throughput.decide.rates import Rate
from tests.support.throughput_rates import TOKENS, Cluster, greeting, made


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


def test_a_window_reaches_back_to_the_point_of_its_age_exactly() -> None:
    cluster = Cluster()
    cluster.arrange(greeting(0))
    for step in range(401):
        cluster.tick(1.0, 3000 if step > 100 else 0)
    assert cluster.rate(window=3) == 10.0
    assert cluster.rate(window=2) == 0.0


@pytest.mark.parametrize(("tick_s", "points"), [(1.0, 13 + 62), (6.0, 3 + 62), (20.0, 1 + 62)])
def test_history_is_twelve_seconds_of_ticks_and_five_minutes_of_coarse_points(tick_s: float, points: int) -> None:
    cluster = Cluster()
    cluster.arrange(greeting(0))
    for step in range(400):
        cluster.tick(tick_s, step)
    assert len(cluster.rates._fine) + len(cluster.rates._coarse) == points


def test_a_tick_longer_than_the_window_is_measured_over_the_tick() -> None:
    cluster = Cluster()
    cluster.arrange(greeting(0))
    for step in range(4):
        cluster.tick(5.0, 100 * step)
    assert cluster.rate(window=0) == 20.0


def test_an_empty_tick_before_any_layout_counts_nothing() -> None:
    cluster = Cluster()
    cluster.rates.update(np.zeros((0, WIDTH), np.int64), 1.0)
    assert cluster.rates.cluster().rates == tuple(Rate(window, 0.0, 0.0, 0.0) for window in (1, 10, 60, 300))


def test_the_first_tick_states_no_rate_of_any_kind() -> None:
    cluster = Cluster()
    assert cluster.rates.cluster().rates == tuple(Rate(window, 0.0, 0.0, 0.0) for window in (1, 10, 60, 300))
    cluster.arrange(greeting(0))
    cluster.tick(1.0, 500)
    assert cluster.row("model", "m").rates == tuple(Rate(window, 0.0, 0.0, 0.0) for window in (1, 10, 60, 300))


def test_arranging_the_same_nodes_again_keeps_one_row_a_cell() -> None:
    cluster = Cluster()
    for _ in range(12):
        cluster.arrange(greeting(0))
        cluster.tick(1.0, 5)
    assert len(cluster.rates._totals) == 3


def test_learning_of_a_cell_that_is_known_does_not_begin_its_life_again() -> None:
    cluster = Cluster()
    cluster.arrange(greeting(0))
    cluster.tick(1.0, 0)
    cluster.tick(1.0, 100)
    told = (Cell("ledger-0", "model", "m", "node-0", ""), tuple(made(50).tolist()))
    cluster.arrange(greeting(0), departed=[told])
    cluster.tick(1.0, 400)
    assert cluster.rate(window=1) == 200.0


def test_a_node_that_was_only_heard_of_begins_at_what_was_told() -> None:
    cluster = Cluster()
    told = (Cell("ledger-0", "model", "m", "node-0", ""), tuple(made(500).tolist()))
    cluster.arrange(greeting(0), departed=[told])
    cluster.tick(1.0, 500)
    cluster.tick(1.0, 600)
    assert cluster.rate("node", "node-0") == 100.0
    assert cluster.rate("node", "node-0", 3) == 100.0


def test_what_was_counted_out_of_sight_bends_no_rate_from_before() -> None:
    cluster = Cluster()
    cluster.arrange(greeting(0), greeting(1))
    for step in range(5):
        cluster.tick(1.0, 0, 10 * step)
    cluster.arrange(greeting(0))
    for _ in range(4):
        cluster.tick(1.0, 0)
    cluster.arrange(greeting(0), greeting(1))
    cluster.tick(1.0, 0, 540)
    cluster.tick(1.0, 0, 640)
    assert cluster.rate("node", "node-1") == 100.0
    assert cluster.rate("node", "node-1", 1) == 64.0


def test_a_model_that_was_not_reduced_yet_has_no_rate() -> None:
    cluster = Cluster()
    bare = Greeting("agent-0", "node-0", "", "ledger-0", ("m",))
    cluster.arrange(bare)
    cluster.tick(1.0, 0)
    cluster.tick(1.0, 10)
    cluster.arrange(replace(bare, models=("m", "n")))
    assert cluster.rate("model", "n") == 0.0
    assert cluster.rate() == 10.0
