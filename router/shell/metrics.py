"""The router's Prometheus metrics, made from its state when they are scraped; docs/metrics.md names each.

Reads in the metrics server's thread: plain attribute reads, safe under the GIL. Replicas and models that left are gone
from the next scrape.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Final

import numpy as np
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from megatoken import metrics as shared
from megatoken.metrics import FastHistogram, FastHistograms
from megatoken.process.loop_lag import LOOP_LAG_BUCKETS_S
from megatoken.router.core.state import RouterState
from megatoken.router.fleet.fleet import Endpoint
from megatoken.router.measures import ModelMeasures
from megatoken.router.shell.leases import IssuedLeases
from megatoken.router.shell.status import replica_state, router_status

PREFIX: Final = "megatoken_router_"
UNKNOWN: Final = "unknown"  # the model label of requests for models that are not there
STATES: Final = ("closed", "open", "half-open", "draining", "ejected", "unreachable")

_TOTALS: Final = (
    ("requests_started", "Requests admitted.", "started"),
    ("prompt_tokens", "Prompt tokens whose prefill was answered; adds up to the ledger.", "prompt_tokens"),
    ("generated_tokens", "Tokens taken over from replicas; adds up to the ledger.", "generated_tokens"),
    ("cached_tokens", "Prompt tokens read from a prefix cache.", "cached_tokens"),
    ("retries", "Requests sent to another replica before their first token.", "retries"),
)
_KINDS: Final = (
    ("requests", "Admitted requests that ended.", "outcome", "outcomes"),
    ("refusals", "Requests not admitted.", "reason", "refusals"),
    ("resumes", "Requests that went on on another replica.", "cause", "resumes"),
)
_TIMES: Final = (
    ("time_to_first_token_seconds", "Arrival to first token.", "first_token_s"),
    ("inter_token_latency_seconds", "Between tokens of a stream, sampled.", "between_tokens_s"),
    ("queue_seconds", "Arrival to dispatch.", "queue_s"),
    ("request_duration_seconds", "Arrival to end.", "whole_s"),
)
_REPLICA_GAUGES: Final[tuple[tuple[str, str, Callable[[Endpoint], float]], ...]] = (
    ("in_flight", "Requests it has from this router.", lambda replica: replica.in_flight),
    ("outstanding_tokens", "Tokens still to come from it.", lambda replica: replica.outstanding_tokens),
    ("decode_tokens_per_second", "Measured, smoothed.", lambda replica: replica.capacity.decode_tokens_per_s),
    ("prefill_tokens_per_second", "Measured, smoothed.", lambda replica: replica.capacity.prefill_tokens_per_s),
    ("rtt_seconds", "Measured round trip.", lambda replica: replica.rtt_s),
)


class StateCollector(Collector):
    """Turns a router's state into metric families."""

    def __init__(self, state: RouterState) -> None:
        self._state = state

    def describe(self) -> Iterator[Metric]:
        """Nothing ahead of time: registering must not read the state."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """Every family, as of now."""
        state = self._state
        models = {pool.model: pool.measures for pool in list(state.fleet.pools.values())}
        yield from _counters({**models, UNKNOWN: state.nowhere})
        for name, text, attribute in _TIMES:
            family = HistogramMetricFamily(PREFIX + name, text, labels=["model"])
            for model, measures in models.items():
                _add_histogram(family, [model], getattr(measures, attribute))
            yield family
        yield from self._by_model()
        yield from self._whole_router()
        yield from _replicas(state.fleet.live(), time.monotonic())

    def _by_model(self) -> Iterator[Metric]:
        running = _gauge("requests_running", "Requests that replicas have.", ["model"])
        queued = _gauge("requests_queued", "Requests that wait for a replica.", ["model"])
        tokens = _gauge("queued_tokens", "Tokens that they may cost.", ["model"])
        for pool in list(self._state.fleet.pools.values()):
            running.add_metric([pool.model], sum(replica.in_flight for replica in pool.replicas))
            queued.add_metric([pool.model], pool.queue.length)
            tokens.add_metric([pool.model], pool.queue.tokens)
        yield from (running, queued, tokens)

    def _whole_router(self) -> Iterator[Metric]:
        state, status = self._state, router_status(self._state)
        sessions = _gauge("sessions", "Open Session streams.", ["peer"])
        sessions.add_metric(["client"], sum(sink is not None for sink in state.sinks))
        sessions.add_metric(["worker"], sum(replica.connected for replica in state.fleet.live()))
        yield sessions
        for name, text, value in (
            ("draining", "1 while the router takes no new requests.", int(state.draining)),
            ("live_bytes", "Encoded requests that the router keeps.", state.live_bytes),
            ("membership_epoch", "Of the snapshot in use.", state.fleet.epoch),
            ("membership_version", "Of the snapshot in use.", state.fleet.version),
            ("membership_connected", "1 while the controller answers.", int(state.membership_connected)),
            ("capacity_ceiling_ratio", "Share of capacity that the present split can reach.", status.ceiling),
        ):
            yield GaugeMetricFamily(PREFIX + name, text, value=value)
        for name, text, total in (
            ("delivered_tokens", "Tokens passed on to clients, each once.", state.ledger.delivered_tokens),
            ("connection_faults", "Links to workers that failed inside the router.", state.ledger.connection_faults),
            ("foreign_tokens", "Tokens for streams that their replica does not have.", state.ledger.foreign_tokens),
        ):
            family = CounterMetricFamily(PREFIX + name, text)
            family.add_metric([], total)
            yield family
        faults = CounterMetricFamily(PREFIX + "faults", "Faults of the router itself.", labels=["doing"])
        for doing, count in list(state.faults.counts.items()):
            faults.add_metric([doing], count)
        yield faults


class LeaseCollector(Collector):
    """Look-aside leases."""

    def __init__(self, leases: IssuedLeases) -> None:
        self._leases = leases

    def describe(self) -> Iterator[Metric]:
        """Nothing ahead of time."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """How many are in force, and how the others ended."""
        yield GaugeMetricFamily(PREFIX + "leases", "Look-aside leases in force.", value=len(self._leases))
        ended = CounterMetricFamily(PREFIX + "leases_ended", "Leases that ended.", labels=["outcome"])
        for outcome, count in self._leases.ended.items():
            ended.add_metric([outcome], count)
        yield ended


def _counters(models: dict[str, ModelMeasures]) -> Iterator[Metric]:
    for name, text, attribute in _TOTALS:
        family = CounterMetricFamily(PREFIX + name, text, labels=["model"])
        for model, measures in models.items():
            family.add_metric([model], getattr(measures, attribute))
        yield family
    for name, text, label, attribute in _KINDS:
        family = CounterMetricFamily(PREFIX + name, text, labels=["model", label])
        for model, measures in models.items():
            for kind, count in getattr(measures, attribute).items():
                family.add_metric([model, kind], count)
        yield family


def _replicas(replicas: list[Endpoint], now: float) -> Iterator[Metric]:
    replicas = [replica for replica in replicas if not replica.gone]
    labels = ["model", "replica"]
    for name, text, value in _REPLICA_GAUGES:
        family = _gauge(f"replica_{name}", text, labels)
        for replica in replicas:
            family.add_metric([replica.member.model, replica.name], value(replica))
        yield family
    states = _gauge("replica_state", "1 for the state that it is in.", [*labels, "state"])
    for replica in replicas:
        present = replica_state(replica, now)
        for state in STATES:
            states.add_metric([replica.member.model, replica.name, state], float(state == present))
    yield states
    tokens = CounterMetricFamily(
        PREFIX + "replica_generated_tokens", "Taken over from it by this router.", labels=labels
    )
    for replica in replicas:
        tokens.add_metric([replica.member.model, replica.name], replica.generated_tokens)
    yield tokens


def _gauge(name: str, text: str, labels: list[str]) -> GaugeMetricFamily:
    return GaugeMetricFamily(PREFIX + name, text, labels=labels)


def _add_histogram(family: HistogramMetricFamily, labels: list[str], histogram: FastHistogram) -> None:
    edges = [*(repr(float(bound)) for bound in histogram.bounds), "+Inf"]
    cumulative = np.cumsum(histogram.counts).tolist()
    family.add_metric(labels, list(zip(edges, cumulative, strict=True)), histogram.sum)


def loop_lag() -> FastHistograms:
    """How late the router's event loop is; filled by megatoken.process.loop_lag."""
    return FastHistograms(PREFIX + "loop_lag_seconds", "Lateness of the event loop, over time.", LOOP_LAG_BUCKETS_S)


def router_registry(state: RouterState, *others: Collector) -> CollectorRegistry:
    """The registry of a router process, with what `others` export."""
    registry = shared.new_registry("router")
    for collector in (StateCollector(state), *others):
        registry.register(collector)
    return registry


def serve_metrics(state: RouterState, *others: Collector) -> tuple[str, Callable[[], None]]:
    """Starts the metrics server; returns its address and how to stop it."""
    config = state.config
    server = shared.serve_metrics(router_registry(state, *others), config.metrics_host, config.metrics_port or 0)
    return f"{config.advertise_host or config.metrics_host}:{server.port}", server.close
