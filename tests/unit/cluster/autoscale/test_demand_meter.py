"""Rates and latencies of a model, from counts of routers that come, go, and begin anew."""

from __future__ import annotations

import pytest

from megatoken.cluster.autoscale.demand import Counts, DemandMeter, quantile

BOUNDS = (0.1, 1.0, 10.0)


def test_what_arrives_is_added_up_over_routers_and_divided_by_the_time() -> None:
    meter = DemandMeter()
    for second in range(20):
        one = Counts(arrived=2 * second, work_s=0.5 * second, measured=True, queued=3, queued_work_s=1.5, running=4)
        other = Counts(arrived=1000 + second, work_s=100 + 0.25 * second, running=1)
        meter.read({"r1": one, "r2": other}, float(second))
    found = meter.demand(BOUNDS, BOUNDS, 2, 70.0)
    assert found.load == pytest.approx(0.75)
    assert found.requests_per_s == pytest.approx(3.0)
    assert (found.waiting, found.running, found.tokens_per_s) == (5, 5, 70.0)
    assert found.waiting_work_s == pytest.approx(1.5 + 2 * 0.75 / 3)


def test_the_first_look_and_a_router_that_is_new_count_nothing_of_the_past() -> None:
    meter = DemandMeter()
    meter.read({"r1": Counts(arrived=5000, measured=True)}, 0.0)
    assert meter.demand(BOUNDS, BOUNDS, 0, 0.0).load is None
    meter.read({"r1": Counts(arrived=5000, measured=True), "r2": Counts(arrived=700, work_s=90.0)}, 1.0)
    found = meter.demand(BOUNDS, BOUNDS, 0, 0.0)
    assert (found.load, found.requests_per_s) == (0.0, 0.0)


def test_a_router_that_was_started_again_counts_from_nothing() -> None:
    meter = DemandMeter()
    meter.read({"r": Counts(arrived=100, work_s=50.0, measured=True)}, 0.0)
    meter.read({"r": Counts(arrived=6, work_s=3.0, measured=True)}, 2.0)
    assert meter.demand(BOUNDS, BOUNDS, 0, 0.0).requests_per_s == 3.0


def test_what_waits_in_a_router_that_does_not_answer_waits_no_more() -> None:
    meter = DemandMeter()
    meter.read({"r": Counts(queued=9, running=9)}, 0.0)
    meter.read({}, 1.0)
    found = meter.demand(BOUNDS, BOUNDS, 0, 0.0)
    assert (found.waiting, found.running) == (0, 0)


def test_until_something_was_measured_load_is_unknown() -> None:
    meter = DemandMeter()
    for second in range(3):
        meter.read({"r": Counts(arrived=second)}, float(second))
    found = meter.demand(BOUNDS, BOUNDS, 0, 0.0)
    assert (found.load, found.requests_per_s) == (None, 1.0)


def test_latencies_are_of_the_last_minute() -> None:
    meter = DemandMeter()
    meter.read({"r": Counts(first_token=(0, 0, 0, 0))}, 0.0)
    meter.read({"r": Counts(first_token=(0, 0, 100, 0))}, 10.0)
    assert meter.demand(BOUNDS, BOUNDS, 0, 0.0).ttft_s == pytest.approx(1.0 + 9.0 * 0.99)
    meter.read({"r": Counts(first_token=(50, 0, 100, 0))}, 71.0)
    found = meter.demand(BOUNDS, BOUNDS, 0, 0.0)
    assert found.ttft_s == pytest.approx(0.099)
    assert found.itl_s is None


def test_a_quantile_is_interpolated_and_never_beyond_the_last_bound() -> None:
    assert quantile(BOUNDS, (), 0.99) is None
    assert quantile(BOUNDS, (0, 0, 0, 0), 0.99) is None
    assert quantile(BOUNDS, (1, 1, 0, 0), 0.5) == pytest.approx(0.1)
    assert quantile(BOUNDS, (0, 10, 0, 0), 0.5) == pytest.approx(0.55)
    assert quantile(BOUNDS, (0, 0, 0, 4), 0.5) == 10.0
