"""megatoken.metrics: the fast histogram against prometheus_client's own, the quantiles, the /metrics server."""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from collections.abc import Iterator

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from megatoken.metrics import (
    ITL_BUCKETS_S,
    MAX_SCRAPES,
    TTFT_BUCKETS_S,
    FastHistogram,
    FastHistograms,
    MetricsServer,
    new_registry,
    serve_metrics,
)


def exposition_of(name: str, registry: CollectorRegistry) -> list[str]:
    lines = generate_latest(registry).decode().splitlines()
    return [line for line in lines if line.startswith(name) and "_created" not in line]


def test_fast_histogram_exposes_what_prometheus_clients_own_would() -> None:
    values = np.random.default_rng(7).lognormal(-3, 1.5, 2000).round(6)
    values[:5] = ITL_BUCKETS_S[:5]  # exactly on a bound: belongs to that bucket
    theirs, ours = CollectorRegistry(), CollectorRegistry()
    reference = Histogram("itl_seconds", "x", ["model"], buckets=ITL_BUCKETS_S, registry=theirs).labels("m")
    family = FastHistograms("itl_seconds", "x", ITL_BUCKETS_S, ["model"], ours)
    for value in values:
        reference.observe(value)
    family[("m",)].observe_many(values[:1500])
    for value in values[1500:]:
        family[("m",)].observe(float(value))
    expected, found = exposition_of("itl_seconds", theirs), exposition_of("itl_seconds", ours)
    assert [line for line in found if "_sum" not in line] == [line for line in expected if "_sum" not in line]
    assert family[("m",)].sum == pytest.approx(values.sum())


def test_observe_counts_a_value_as_often_as_told() -> None:
    histogram = FastHistogram((1.0, 2.0))
    histogram.observe(1.5, times=4)
    histogram.observe_many([])
    assert histogram.counts.tolist() == [0, 4, 0]
    assert histogram.sum == 6.0


def test_quantiles_interpolate_and_can_look_at_a_window() -> None:
    histogram = FastHistogram((1.0, 2.0, 4.0))
    assert histogram.quantiles((0.5, 0.99)) == [0.0, 0.0]
    histogram.observe_many([0.5] * 100)
    before = histogram.counts.copy()
    histogram.observe_many([3.0] * 10)
    assert histogram.quantiles((0.5,), since=before) == [3.0]
    assert histogram.quantiles((0.0, 0.5)) == pytest.approx([0.0, 0.55])
    histogram.observe_many([100.0] * 1000)
    assert histogram.quantiles((1.0,)) == [4.0]


def test_label_sets_are_bounded() -> None:
    family = FastHistograms("t_seconds", "x", (1.0,), ["model"], max_children=2)
    for name in ("a", "b", "c", "d"):
        family[(name,)].observe(0.5)
    (metric,) = family.collect()
    counts = {sample.labels["model"]: sample.value for sample in metric.samples if sample.name.endswith("_count")}
    assert counts == {"a": 1, "b": 1, "other": 2}
    family.remove(("a",))
    assert len(next(iter(family.collect())).samples) < len(metric.samples)
    with pytest.raises(ValueError, match="has labels"):
        family[("a", "b")]


def test_bounds_must_grow_and_hold_the_mlperf_limits() -> None:
    with pytest.raises(ValueError, match="must grow"):
        FastHistogram((1.0, 1.0))
    assert {0.45, 2.0, 3.0} <= set(TTFT_BUCKETS_S)
    assert {0.015, 0.04, 0.08, 0.2} <= set(ITL_BUCKETS_S)


@pytest.fixture
def server() -> Iterator[MetricsServer]:
    registry = new_registry("worker")
    Counter("megatoken_worker_generated_tokens_total", "x", registry=registry).inc(5)
    started = serve_metrics(
        registry,
        "127.0.0.1",
        0,
        extra=lambda: b"vllm_extra 1\n",
        routes={"/sd": lambda: ("application/json", b"[]")},
    )
    yield started
    started.close()


def fetch(server: MetricsServer, path: str) -> tuple[str, str]:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}{path}", timeout=5) as answer:
        return answer.headers["Content-Type"], answer.read().decode()


def test_metrics_server_serves_its_routes_and_nothing_else(server: MetricsServer) -> None:
    kind, body = fetch(server, "/metrics?x=1")
    assert kind.startswith("text/plain; version=0.0.4")
    assert "megatoken_worker_generated_tokens_total 5.0" in body
    assert 'megatoken_build_info{kind="worker"' in body
    assert "process_cpu_seconds_total" in body
    assert body.endswith("vllm_extra 1\n")
    assert fetch(server, "/sd") == ("application/json", "[]")
    with pytest.raises(urllib.error.HTTPError, match="404"):
        fetch(server, "/secret")


def test_more_scrapes_at_a_time_than_allowed_are_refused() -> None:
    go, inside = threading.Event(), threading.Semaphore(0)

    def slow() -> tuple[str, bytes]:
        inside.release()
        go.wait(10)
        return "text/plain", b"done"

    server = MetricsServer("127.0.0.1", 0, {"/slow": slow})
    try:
        scrapers = [threading.Thread(target=fetch, args=(server, "/slow")) for _ in range(MAX_SCRAPES)]
        for scraper in scrapers:
            scraper.start()
        for _ in scrapers:
            assert inside.acquire(timeout=5)
        with pytest.raises(urllib.error.HTTPError, match="503"):
            fetch(server, "/slow")
        go.set()
        for scraper in scrapers:
            scraper.join(5)
        assert fetch(server, "/slow")[1] == "done"
    finally:
        go.set()
        server.close()


def test_a_scrape_that_fails_answers_500_and_the_next_one_works() -> None:
    outcomes = iter([RuntimeError("broken"), b"fine"])

    def sometimes() -> tuple[str, bytes]:
        outcome = next(outcomes)
        if isinstance(outcome, Exception):
            raise outcome
        return "text/plain", outcome

    server = MetricsServer("127.0.0.1", 0, {"/metrics": sometimes})
    try:
        with pytest.raises(urllib.error.HTTPError, match="500"):
            fetch(server, "/metrics")
        assert fetch(server, "/metrics")[1] == "fine"
    finally:
        server.close()


def test_closing_the_server_frees_its_port() -> None:
    first = MetricsServer("127.0.0.1", 0, {})
    port = first.port
    with pytest.raises(OSError, match="in use"):
        MetricsServer("127.0.0.1", port, {})
    first.close()
    MetricsServer("127.0.0.1", port, {}).close()
