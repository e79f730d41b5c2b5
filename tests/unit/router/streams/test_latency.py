"""Percentiles of a sliding minute, in exact buckets: a bucket's upper edge is what is told."""

from __future__ import annotations

import numpy as np
import pytest

from megatoken.router.streams.latency import Latencies, SlidingHistogram, edges_s

BUCKETS = 233


def edge_ms(bucket: int) -> float:
    return float(0.1 * 2 ** ((bucket + 1) / 10))


def filled(values_s: list[float], now: float, many: bool) -> SlidingHistogram:
    histogram = SlidingHistogram()
    if many:
        histogram.add_many(np.array(values_s), now)
    else:
        for value_s in values_s:
            histogram.add(value_s, now)
    return histogram


def test_edges_are_ten_an_octave_from_a_tenth_of_a_millisecond() -> None:
    edges = edges_s()
    assert len(edges) == BUCKETS
    assert edges[[9, 19]].tolist() == pytest.approx([2e-4, 4e-4])
    assert edges[-1] == pytest.approx(1e-4 * 2**23.3)


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize(
    ("seconds", "bucket"),
    [
        (-1.0, 0),
        (0.0, 0),
        (1e-4, 0),
        (1.07e-4, 0),
        (1.08e-4, 1),
        (1.99e-4, 9),
        (2.01e-4, 10),
        (1.0, 132),
        (1000.0, 232),
        (1e6, 232),
    ],
)
def test_each_latency_is_told_by_the_edge_above_it(seconds: float, bucket: int, many: bool) -> None:
    assert filled([seconds], 5.0, many).percentiles_ms((0.5,), 5.0) == pytest.approx([edge_ms(bucket)])


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize(
    ("share", "bucket"), [(0.25, 0), (0.26, 10), (0.5, 10), (0.51, 20), (0.75, 20), (0.76, 30), (1.0, 30)]
)
def test_a_percentile_is_the_first_bucket_that_reaches_its_share(share: float, bucket: int, many: bool) -> None:
    histogram = filled([1e-4, 2.01e-4, 4.01e-4, 8.01e-4], 5.0, many)
    assert histogram.percentiles_ms((share,), 5.0) == pytest.approx([edge_ms(bucket)])


def test_several_percentiles_come_in_the_order_asked_for() -> None:
    histogram = filled([1e-4, 2.01e-4, 4.01e-4, 8.01e-4], 5.0, True)
    expected = [edge_ms(30), edge_ms(0), edge_ms(10)]
    assert histogram.percentiles_ms((0.99, 0.1, 0.5), 5.0) == pytest.approx(expected)


def test_nothing_came_and_nothing_is_told() -> None:
    assert SlidingHistogram().percentiles_ms((0.5, 0.99), 5.0) == []
    assert filled([], 5.0, True).percentiles_ms((0.5,), 5.0) == []


@pytest.mark.parametrize(("now", "told"), [(12.0, True), (59.9, True), (60.0, True), (69.9, True), (70.0, False)])
def test_a_slice_counts_until_six_have_begun(now: float, told: bool) -> None:
    assert bool(filled([1.0], 12.0, False).percentiles_ms((0.5,), now)) is told


def test_what_comes_later_is_added_and_what_is_old_goes() -> None:
    histogram = SlidingHistogram()
    for now, value_s in [(9.9, 1e-4), (10.0, 2.01e-4), (19.9, 4.01e-4)]:
        histogram.add(value_s, now)
    shares = (0.3, 0.6, 0.9)
    assert histogram.percentiles_ms(shares, 20.0) == pytest.approx([edge_ms(0), edge_ms(10), edge_ms(20)])
    assert histogram.percentiles_ms(shares, 65.0) == pytest.approx([edge_ms(10), edge_ms(20), edge_ms(20)])
    assert histogram.percentiles_ms(shares, 75.0) == []


def test_one_by_one_and_many_at_once_add_up() -> None:
    histogram = filled([1e-4], 5.0, False)
    histogram.add_many(np.array([2.01e-4, 2.01e-4]), 6.0)
    histogram.add(4.01e-4, 7.0)
    shares = (0.25, 0.75, 0.76)
    assert histogram.percentiles_ms(shares, 8.0) == pytest.approx([edge_ms(0), edge_ms(10), edge_ms(20)])


def test_first_tokens_and_those_between_are_apart() -> None:
    latencies = Latencies()
    latencies.first_token.add(1.0, 5.0)
    assert latencies.between_tokens.percentiles_ms((0.5,), 5.0) == []
