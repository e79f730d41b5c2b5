"""What every process's Prometheus metrics share: bucket bounds, a registry, a cheap histogram, the /metrics server.

docs/metrics.md is the contract for names and labels. The metrics themselves live in worker/metrics.py,
router/shell/metrics.py and so on; only those and this module import prometheus_client.
"""

from __future__ import annotations

import importlib.metadata
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from prometheus_client import CollectorRegistry, Gauge, ProcessCollector, disable_created_metrics, generate_latest
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

# Upper bounds in seconds. The limits of MLPerf Inference's LLM scenarios (time to first token 0.45, 2 and 3 s, time per
# output token 15, 40, 80 and 200 ms) are bounds themselves, so that the share of requests within one is exact.
TTFT_BUCKETS_S: Final = (
    *(0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.45),
    *(0.6, 0.8, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0),
)
ITL_BUCKETS_S: Final = (
    *(0.0005, 0.001, 0.002, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08),
    *(0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0),
)
DURATION_BUCKETS_S: Final = (
    *(0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 6.0, 8.0, 10.0, 15.0, 20.0, 30.0, 45.0),
    *(60.0, 90.0, 120.0, 180.0, 300.0, 600.0, 1800.0),
)
QUEUE_BUCKETS_S: Final = (
    *(0.0001, 0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0),
)
COLLECTIVE_BUCKETS_S: Final = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 3.0, 5.0)
FRAME_TOKENS_BUCKETS: Final = tuple(float(2**power) for power in range(13))  # 1 .. 4096

logger = logging.getLogger(__name__)

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
MAX_SCRAPES: Final = 8  # at a time; Prometheus sends one, so more is a mistake or an attack
SCRAPE_TIMEOUT_S: Final = 10.0  # Prometheus' own default

Floats = npt.NDArray[np.float64]


class FastHistogram:
    """A histogram that takes many values in one call: 8.5 us for 256 of them, 1.4 us for one.

    prometheus_client's own takes 1.6 us a value (same machine), which per token is too much. Not locked: one thread
    observes, and a scrape that reads in between sees a count that is one call older than the sum at most.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        if list(bounds) != sorted(set(bounds)):
            raise ValueError(f"histogram bounds must grow: {bounds}")
        self.bounds: Floats = np.asarray(bounds, np.float64)
        self.counts = np.zeros(len(bounds) + 1, np.int64)  # the last is above every bound
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """One value, `times` times, e.g. one gap of a frame that moved that many streams."""
        self.counts[self.bounds.searchsorted(value)] += times
        self.sum += value * times

    def observe_many(self, values: npt.ArrayLike) -> None:
        """Each of `values` once."""
        found = np.asarray(values, np.float64)
        if found.size:
            self.counts += np.bincount(self.bounds.searchsorted(found), minlength=len(self.counts))
            self.sum += float(found.sum())

    def quantiles(self, shares: Sequence[float], since: npt.NDArray[np.int64] | None = None) -> list[float]:
        """Each share's quantile, interpolated inside its bucket as Prometheus does; `since` is an earlier copy of
        `counts`, to look at a window only. 0 when nothing was observed; at most the highest bound."""
        return quantiles(self.bounds, self.counts if since is None else self.counts - since, shares)


def quantiles(bounds: Floats, counts: npt.NDArray[np.int64], shares: Sequence[float]) -> list[float]:
    """Of values by bucket, as FastHistogram has them; 0 when there is none, at most the highest bound."""
    cumulative = np.cumsum(counts)
    total = int(cumulative[-1])
    if total == 0:
        return [0.0] * len(shares)
    edges = np.concatenate(([0.0], bounds, bounds[-1:]))
    found = []
    for share in shares:
        rank = share * total
        bucket = int(np.searchsorted(cumulative, max(rank, 1e-9)))
        below = int(cumulative[bucket - 1]) if bucket else 0
        part = (rank - below) / max(int(counts[bucket]), 1)
        found.append(float(edges[bucket] + (edges[bucket + 1] - edges[bucket]) * part))
    return found


class FastHistograms(Collector):
    """A family of FastHistograms under one metric name: `family[("model-a",)].observe(0.2)`.

    At most `max_children` label sets; any beyond share one whose labels all say "other".
    """

    def __init__(
        self,
        name: str,
        documentation: str,
        bounds: Sequence[float],
        labels: Sequence[str] = (),
        registry: CollectorRegistry | None = None,
        max_children: int = 1024,
    ) -> None:
        self._name, self._documentation, self._bounds = name, documentation, tuple(bounds)
        self._labels, self._max_children = tuple(labels), max_children
        self._children: dict[tuple[str, ...], FastHistogram] = {}
        if registry is not None:
            registry.register(self)

    def __getitem__(self, values: tuple[str, ...]) -> FastHistogram:
        child = self._children.get(values)
        if child is None:
            if len(values) != len(self._labels):
                raise ValueError(f"{self._name} has labels {self._labels}, got values {values}")
            if len(self._children) >= self._max_children:
                values = ("other",) * len(self._labels)
            child = self._children.setdefault(values, FastHistogram(self._bounds))
        return child

    def remove(self, values: tuple[str, ...]) -> None:
        """Forgets a label set, e.g. of a model that is gone."""
        self._children.pop(values, None)

    def collect(self) -> Iterable[Metric]:
        family = HistogramMetricFamily(self._name, self._documentation, labels=self._labels)
        for values, child in list(self._children.items()):
            cumulative = np.cumsum(child.counts).tolist()
            edges = [*(repr(float(bound)) for bound in self._bounds), "+Inf"]
            family.add_metric(list(values), [(edge, n) for edge, n in zip(edges, cumulative, strict=True)], child.sum)
        yield family

    def describe(self) -> Iterator[Metric]:
        yield HistogramMetricFamily(self._name, self._documentation, labels=self._labels)


def new_registry(kind: str) -> CollectorRegistry:
    """A process's own registry: CPU, memory and descriptors of the process, and megatoken_build_info."""
    disable_created_metrics()  # a gauge beside every counter that no query of ours asks for
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    build = Gauge("megatoken_build_info", "Always 1; what runs here.", ["kind", "version"], registry=registry)
    build.labels(kind, importlib.metadata.version("megatoken")).set(1)
    return registry


# A route answers (content type, body); it is called in a thread of the server.
Route = Callable[[], tuple[str, bytes]]


def metrics_route(registry: CollectorRegistry, extra: Callable[[], bytes] | None = None) -> Route:
    """The exposition of `registry`, then whatever text `extra` adds (e.g. an engine's own metrics)."""

    def answer() -> tuple[str, bytes]:
        body = generate_latest(registry)
        return CONTENT_TYPE, body + extra() if extra is not None else body

    return answer


class MetricsServer:
    """Serves GET of a few paths from daemon threads, at most MAX_SCRAPES at a time. `close()` frees the port."""

    def __init__(self, host: str, port: int, routes: Mapping[str, Route]) -> None:
        places = threading.BoundedSemaphore(MAX_SCRAPES)
        self.paths = frozenset(routes)

        class Handler(BaseHTTPRequestHandler):
            timeout = SCRAPE_TIMEOUT_S
            protocol_version = "HTTP/1.0"  # a connection a scrape; nothing is kept open

            def do_GET(self) -> None:
                route = routes.get(self.path.partition("?")[0])
                if route is None:
                    self.send_error(404, "only " + ", ".join(sorted(routes)) + " here")
                    return
                if not places.acquire(blocking=False):
                    self.send_error(503, f"{MAX_SCRAPES} scrapes are in progress")
                    return
                try:
                    content_type, body = route()
                except Exception:  # a scrape that fails must not end with half an answer, nor silently
                    logger.exception("scrape of %s failed", self.path[:80])
                    self.send_error(500, "the scrape failed; the process's log says why")
                    return
                finally:
                    places.release()
                self.send_response(200)
                self.send_header("Content-Type", content_type)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments: Any) -> None:
                """A scrape every few seconds is no news."""

        self._server = ThreadingHTTPServer((host, port), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """The port that was bound; the one asked for, unless that was 0."""
        return int(self._server.server_address[1])

    def close(self) -> None:
        """Stops answering and waits for the accepting thread."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def serve_metrics(
    registry: CollectorRegistry,
    host: str,
    port: int,
    extra: Callable[[], bytes] | None = None,
    routes: Mapping[str, Route] | None = None,
) -> MetricsServer:
    """Starts /metrics (and `routes`) on host:port; port 0 takes any. Raises OSError when the port is in use."""
    return MetricsServer(host, port, {"/metrics": metrics_route(registry, extra), **(routes or {})})
