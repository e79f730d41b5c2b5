"""The worker's Prometheus metrics: read from the replica when scraped, so that serving pays nothing for them.

docs/metrics.md names each. Totals come from the same memory as the counters file and Load.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

import numpy as np
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from megatoken.metrics import FastHistogram, new_registry
from megatoken.worker import totals
from megatoken.worker.replica import RunningReplica

LABELS: Final = ("model", "replica", "engine")
PREFIX: Final = "megatoken_worker_"

_COUNTERS: Final = (
    ("prompt_tokens", "Tokens of accepted prompts.", totals.PROMPT_TOKENS, 1.0),
    ("generated_tokens", "Tokens generated; equals the counters file.", totals.GENERATED_TOKENS, 1.0),
    ("made_tokens", "Tokens that the engine made for requests.", totals.MADE_TOKENS, 1.0),
    ("dropped_tokens", "Of them, those whose request nobody waited for any more.", totals.DROPPED_TOKENS, 1.0),
    ("cached_tokens", "Prompt tokens read from the prefix cache.", totals.CACHED_TOKENS, 1.0),
    ("requests_started", "Requests given to the engine.", totals.REQUESTS_STARTED, 1.0),
    ("busy_seconds", "Time with at least one request running.", totals.BUSY_US, 1e-6),
)
_ENERGY: Final = (("energy_joules", "Used by its devices since it began to serve.", totals.ENERGY_MJ, 1e-3),)


class WorkerCollector(Collector):
    """Turns one replica's numbers into metric families."""

    def __init__(self, replica: RunningReplica) -> None:
        self._replica = replica
        config = replica.config
        self._values = (config.model, config.replica, replica.facts.engine)

    def describe(self) -> Iterator[Metric]:
        """Nothing ahead of time: names are fixed, and registering must not read the replica."""
        return iter(())

    def collect(self) -> Iterable[Metric]:
        """Every family, as of now."""
        yield from self._counters()
        yield from self._gauges()
        yield from self._histograms()
        if self._replica.facts.engine == "vllm":
            yield from self._engine_own()

    def _counters(self) -> Iterator[Metric]:
        replica = self._replica
        replica.load()  # brings the busy time up to now
        energy = _ENERGY if replica.energy is not None else ()
        for name, text, index, scale in (*_COUNTERS, *energy):
            family = CounterMetricFamily(PREFIX + name, text, labels=LABELS)
            family.add_metric(self._values, replica.counters[index] * scale)
            yield family
        yield self._by("requests", "Requests that ended.", "outcome", replica.measures.outcomes)
        yield self._by("refusals", "Requests not given to the engine.", "reason", replica.measures.refusals)
        for name, text, value in (
            ("frames", "Frames sent, one an engine step and session.", replica.measures.frames),
            ("probe_tokens", "Tokens that the engine made for probes.", replica.probe_tokens),
        ):
            family = CounterMetricFamily(PREFIX + name, text, labels=LABELS)
            family.add_metric(self._values, value)
            yield family

    def _by(self, name: str, text: str, label: str, counts: dict[str, int]) -> Metric:
        family = CounterMetricFamily(PREFIX + name, text, labels=(*LABELS, label))
        for value, count in counts.items():
            family.add_metric((*self._values, value), count)
        return family

    def _gauges(self) -> Iterator[Metric]:
        replica, load, facts = self._replica, self._replica.engine.load, self._replica.facts
        info = GaugeMetricFamily(PREFIX + "info", "Always 1.", labels=(*LABELS, "device_kind", "engine_version"))
        info.add_metric((*self._values, replica.config.device_kind, facts.version), 1)
        yield info
        for name, text, value in (
            ("requests_running", "Requests in the engine's batch.", load.running),
            ("requests_waiting", "Requests queued in the engine.", load.waiting),
            ("requests_running_limit", "The most requests that the engine batches.", facts.max_running),
            ("kv_cache_usage_ratio", "Share of KV cache blocks in use.", load.kv_usage),
            ("kv_cache_capacity_tokens", "Tokens that the KV cache holds.", facts.kv_cache_tokens),
            ("sessions", "Open Session streams.", replica.sessions),
            ("draining", "1 while draining.", int(replica.draining)),
        ):
            family = GaugeMetricFamily(PREFIX + name, text, labels=LABELS)
            family.add_metric(self._values, value)
            yield family

    def _engine_own(self) -> Iterator[Metric]:
        """What vLLM's own exporter says of its scheduler, by its names and with its labels beside ours."""
        replica, load = self._replica, self._replica.engine.load
        labels = (*LABELS[:2], "model_name", "engine")
        values = (*self._values[:2], self._values[0], "0")
        gauges = (
            ("num_requests_running", "Number of requests in model execution batches.", load.running),
            ("num_requests_waiting", "Number of requests waiting to be processed.", load.waiting),
            ("kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.", load.kv_usage),
        )
        counters = (
            ("prefix_cache_queries", "Prefix cache queries, in tokens.", load.prefix_queries),
            ("prefix_cache_hits", "Prefix cache hits, in tokens.", load.prefix_hits),
            ("prompt_tokens", "Number of prefill tokens processed.", replica.counters[totals.PROMPT_TOKENS]),
            ("generation_tokens", "Number of generation tokens.", load.made_tokens),
        )
        for kind, rows in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, text, value in rows:
                family = kind("vllm:" + name, text, labels=labels)
                family.add_metric(values, value)
                yield family

    def _histograms(self) -> Iterator[Metric]:
        measures = self._replica.measures
        for name, text, histogram in (
            ("time_to_first_token_seconds", "Arrival to first token.", measures.ttft_s),
            ("inter_token_latency_seconds", "Between tokens of a stream.", measures.itl_s),
            ("queue_seconds", "Arrival to first scheduled.", measures.queue_s),
            ("request_duration_seconds", "Arrival to end.", measures.duration_s),
            ("frame_tokens", "Tokens a frame.", measures.frame_tokens),
            ("loop_lag_seconds", "Lateness of the event loop, over time.", measures.loop_lag_s),
        ):
            yield self._histogram(name, text, histogram)

    def _histogram(self, name: str, text: str, histogram: FastHistogram) -> Metric:
        family = HistogramMetricFamily(PREFIX + name, text, labels=LABELS)
        edges = [*(repr(float(bound)) for bound in histogram.bounds), "+Inf"]
        cumulative = np.cumsum(histogram.counts).tolist()
        family.add_metric(self._values, list(zip(edges, cumulative, strict=True)), histogram.sum)
        return family


def worker_registry(replica: RunningReplica) -> CollectorRegistry:
    """The registry of a worker process."""
    registry = new_registry("worker")
    registry.register(WorkerCollector(replica))
    return registry
