"""A point a minute and model: what was counted since the last, and means; kept for a bounded time."""

from pathlib import Path

import pytest

from megatoken.cluster.controller.monitoring.history import KEPT_S, STEP_S, History, thinned
from megatoken.cluster.controller.state import StateStore
from megatoken.v1 import control_pb2, router_pb2


def status(unix_s: float, rate: float, generated: int, capacity: float = 0.0) -> control_pb2.ClusterStatus:
    found = control_pb2.ClusterStatus(unix_s=unix_s)
    found.models.add(model="m", ready=1, wanted=2, generated_tokens_per_s=rate)
    found.replicas.add(replica="m-1", model="m", state="READY", ranks=["rank 0", "rank 1"])
    found.replicas.add(replica="m-2", model="m", state="STARTING", ranks=["rank 0"])
    if capacity:
        entry = found.efficiency.add(model="m", capacity_tokens_per_s=capacity)
        entry.lost.add(cause="idle", tokens_per_s=capacity - rate)
    row = found.throughput.rows.add(kind="model", name="m")
    row.workers.generated_tokens = generated
    return found


def router(name: str, resumes: int, refused: int) -> router_pb2.RouterStatus:
    return router_pb2.RouterStatus(router=name, resumes=resumes, requests_refused=refused)


@pytest.fixture
def store(tmp_path: Path) -> StateStore:
    return StateStore(tmp_path / "state.sqlite")


def minutes(history: History, count: int) -> None:
    """Two ticks a minute."""
    for tick in range(2 * count + 1):
        at = 1000.0 + tick * STEP_S / 2
        history.look(status(at, 10.0 * (tick % 2), 1000 + 7 * tick, 40.0), {"m-1": "cpu"}, [router("r", tick, 3)])


def test_a_point_holds_means_and_what_was_counted_since_the_last(store: StateStore) -> None:
    history = History(store)
    minutes(history, 2)
    routers, first = [point for point in history.points(0.0) if point.unix_s == 1060.0]
    assert (routers.model, routers.resumed, routers.refused, routers.seconds) == ("", 2, 0, 60.0)
    assert (first.model, first.ready, first.wanted) == ("m", 1, 2)
    assert first.tokens_per_s == pytest.approx(10 / 3)
    assert first.capacity_tokens_per_s == pytest.approx(40.0)
    assert first.lost[0].tokens_per_s == pytest.approx(40 - 10 / 3)
    assert first.device_seconds["cpu"] == 120.0, "two ranks that served for a minute"
    assert first.counted.generated_tokens == 0, "what was counted before the first point may be days old"
    (second,) = [point for point in history.points(1060.0) if point.model == "m"]
    assert second.counted.generated_tokens == 14


def test_another_controller_goes_on_with_the_same_past(store: StateStore) -> None:
    minutes(History(store), 1)
    assert [point.model for point in History(store).points(0.0)] == ["", "m"]
    assert list(History(store).points(2000.0)) == []


def test_a_router_that_was_started_again_counts_from_nought(store: StateStore) -> None:
    history = History(store)
    for tick, resumes in enumerate((50, 52, 1)):
        history.look(status(1000.0 + tick * STEP_S, 0.0, 0), {}, [router("r", resumes, 0)])
    assert [point.resumed for point in history.points(0.0) if not point.model] == [2, 1]


def test_a_clock_that_was_set_back_makes_no_negative_minute(store: StateStore) -> None:
    history = History(store)
    history.look(status(1000.0, 0.0, 0), {}, [])
    history.look(status(10.0, 0.0, 0), {}, [])
    history.look(status(10.0 + STEP_S, 0.0, 0), {}, [])
    assert [point.seconds for point in history.points(0.0)] == [STEP_S, STEP_S]


def test_of_a_long_time_several_points_are_made_one_and_nothing_is_lost() -> None:
    points = []
    for minute in range(5):
        point = control_pb2.HistoryPoint(
            unix_s=60.0 * minute,
            seconds=60.0,
            model="m",
            tokens_per_s=10.0 * minute,
            refused=1,
            resumed=minute,
            ready=minute,
        )
        point.counted.generated_tokens = 100 * minute
        point.device_seconds["cpu"] = 60.0
        point.lost.add(cause="idle", tokens_per_s=5.0)
        points.append(point)
    first, second = thinned(points, 2)
    assert (first.unix_s, first.seconds, first.ready) == (120.0, 180.0, 2)
    assert (second.unix_s, second.seconds, second.ready) == (240.0, 120.0, 4)
    assert (first.tokens_per_s, second.tokens_per_s) == (pytest.approx(10.0), pytest.approx(35.0))
    assert [point.counted.generated_tokens for point in (first, second)] == [300, 700]
    assert [point.device_seconds["cpu"] for point in (first, second)] == [180.0, 120.0]
    assert [(point.refused, point.resumed) for point in (first, second)] == [(3, 3), (2, 7)]
    assert first.lost[0].tokens_per_s == pytest.approx(5.0)
    assert thinned(points, 5) == points
    assert thinned([], 5) == []


def test_what_is_older_than_its_time_goes(store: StateStore) -> None:
    history = History(store)
    minutes(history, 1)
    at = 1060.0 + KEPT_S + 1
    history.look(status(at, 0.0, 0), {}, [])
    assert {point.unix_s for point in history.points(0.0)} == {at}
