"""Prometheus metrics of a router, made from its state when they are scraped: nothing is counted twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from router.latency import Histogram, edges_s
from router.state import RouterState
from router.status import router_status

_TOTALS = (
    ("prompt_tokens", "Prompt tokens that replicas prefilled for this router."),
    ("generated_tokens", "Tokens that replicas generated for this router."),
    ("cached_tokens", "Prompt tokens read from replicas' prefix caches."),
    ("requests_started", "Requests taken on."),
    ("requests_finished", "Requests that ended well."),
    ("requests_failed", "Requests that ended with an error, or were cancelled."),
)
_HISTOGRAM_EVERY = 10  # one exported bucket a factor of 2


class StateCollector(Collector):
    """Reads the router's state in the metrics server's thread: plain attribute reads, safe under the GIL."""

    def __init__(self, state: RouterState) -> None:
        self._state = state

    def collect(self) -> Iterator[Metric]:
        state = self._state
        for name, text in _TOTALS:
            metric = CounterMetricFamily(f"megatoken_router_{name}", text)
            metric.add_metric([], state.ledger[name])
            yield metric
        for name, text, value in (
            ("requests_refused", "Requests refused at the door.", state.ledger.refused),
            ("resumes", "Times that a request went on on another replica.", state.ledger.resumes),
            ("delivered_tokens", "Tokens passed on to clients.", state.ledger.delivered_tokens),
            (
                "foreign_tokens",
                "Tokens that came for streams their replica does not have.",
                state.ledger.foreign_tokens,
            ),
        ):
            metric = CounterMetricFamily(f"megatoken_router_{name}", text)
            metric.add_metric([], value)
            yield metric
        yield from self._gauges()
        latencies = state.latencies
        for name, text, histogram in (
            ("time_to_first_token", "Arrival to first token.", latencies.first_token),
            ("inter_token", "Between two tokens of a stream, sampled.", latencies.between_tokens),
            ("queue", "Arrival to dispatch.", latencies.queue),
            ("request", "Arrival to end.", latencies.whole),
        ):
            yield _histogram(f"megatoken_router_{name}_seconds", text, histogram)

    def _gauges(self) -> Iterator[Metric]:
        status = router_status(self._state)
        for name, text, value in (
            ("running_requests", "Requests that replicas have.", status.running),
            ("queued_requests", "Requests that wait for a replica.", status.queued),
            (
                "capacity_ceiling_ratio",
                "Share of the fleet's capacity that the present split can reach.",
                status.ceiling,
            ),
            ("draining", "1 while the router takes no new requests.", int(status.draining)),
            ("membership_version", "Version of the snapshot in use.", status.membership_version),
        ):
            yield GaugeMetricFamily(f"megatoken_router_{name}", text, value=value)
        labels = ["replica", "model"]
        families = {
            "in_flight": GaugeMetricFamily(
                "megatoken_router_replica_in_flight_requests", "Requests it has from this router.", labels=labels
            ),
            "outstanding_tokens": GaugeMetricFamily(
                "megatoken_router_replica_outstanding_tokens", "Tokens still to come from it.", labels=labels
            ),
            "decode_tokens_per_s": GaugeMetricFamily(
                "megatoken_router_replica_decode_tokens_per_second", "Measured decode capacity.", labels=labels
            ),
            "kv_usage": GaugeMetricFamily(
                "megatoken_router_replica_kv_usage_ratio", "Share of its KV cache in use.", labels=labels
            ),
        }
        for replica in status.replicas:
            for field, family in families.items():
                family.add_metric([replica.replica, replica.model], getattr(replica, field))
        up = GaugeMetricFamily(
            "megatoken_router_replica_state", "1 for the state that it is in.", labels=[*labels, "state"]
        )
        for replica in status.replicas:
            up.add_metric([replica.replica, replica.model, replica.state], 1)
        yield from families.values()
        yield up


def _histogram(name: str, text: str, histogram: Histogram) -> HistogramMetricFamily:
    cumulative = histogram.total.cumsum()
    edges = edges_s()
    picked = range(_HISTOGRAM_EVERY - 1, len(edges), _HISTOGRAM_EVERY)
    buckets = [(f"{edges[i]:.6g}", int(cumulative[i])) for i in picked]
    buckets.append(("+Inf", int(cumulative[-1])))
    family = HistogramMetricFamily(name, text)
    family.add_metric([], buckets, histogram.sum_s)
    return family


def serve_metrics(state: RouterState) -> tuple[str, Callable[[], None]]:
    """Starts the metrics server; returns its address and how to stop it."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(StateCollector(state))
    host = state.config.metrics_host
    server, thread = start_http_server(state.config.metrics_port or 0, host, registry)

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join(5)

    return f"{state.config.advertise_host or host}:{server.server_port}", stop
