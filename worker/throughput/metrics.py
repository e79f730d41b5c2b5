"""What an agent exports to Prometheus: docs/metrics.md, "Throughput" and "Agent". The rows are made at a scrape."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from megatoken.counters import INDEX
from megatoken.metrics import COLLECTIVE_BUCKETS_S, FastHistograms, new_registry
from megatoken.worker.throughput.decide.rates import RateRow

WINDOW_NAMES = {1: "1s", 10: "10s", 60: "1m", 300: "5m"}
TOKENS = {"generated": "generated_tokens", "prompt": "prompt_tokens", "cached": "cached_tokens"}


class AgentMetrics:
    """The registry of one agent and what its shell counts."""

    def __init__(self) -> None:
        self.registry: CollectorRegistry = new_registry("agent")
        self._info = Gauge("megatoken_agent_info", "Always 1.", ["backend"], registry=self.registry)
        self._samples = Counter(
            "megatoken_agent_samples", "Ticks, by whether every rank was there.", ["complete"], registry=self.registry
        )
        for value in ("true", "false"):
            self._samples.labels(value)
        self._collective = FastHistograms(
            "megatoken_agent_collective_seconds", "One reduction.", COLLECTIVE_BUCKETS_S, (), self.registry
        )
        self.epochs = Counter("megatoken_agent_epochs", "Rank sets joined.", registry=self.registry)
        self._join = FastHistograms(
            "megatoken_agent_epoch_join_seconds",
            "Publication of a rank set to its first complete sample.",
            COLLECTIVE_BUCKETS_S,
            (),
            self.registry,
        )
        self._errors = Counter(
            "megatoken_agent_errors", "Ticks or joins that failed.", ["reason"], registry=self.registry
        )
        self._files = Gauge(
            "megatoken_agent_files", "Counter files read on this node.", ["kind"], registry=self.registry
        )
        self._faults = Counter(
            "megatoken_agent_file_faults",
            "Counter files left out, and totals that went down.",
            ["reason"],
            registry=self.registry,
        )
        for value in ("unreadable", "backwards"):
            self._faults.labels(value)
        self.clock_jumps = Counter(
            "megatoken_agent_clock_jumps", "Jumps of the wall clock against the monotonic one.", registry=self.registry
        )
        self._collective[()], self._join[()]

    def formed(self, backend: str) -> None:
        """A group formed."""
        self.epochs.inc()
        self._info.clear()
        self._info.labels(backend).set(1)

    def complete(self, collective_s: float, joined_s: float | None) -> None:
        """A whole sample; `joined_s` for the first of an epoch."""
        self._samples.labels("true").inc()
        self._collective[()].observe(collective_s)
        if joined_s is not None:
            self._join[()].observe(joined_s)

    def incomplete(self) -> None:
        """A sample without every rank."""
        self._samples.labels("false").inc()

    def error(self, reason: str) -> None:
        """A tick or a join failed."""
        self._errors.labels(reason).inc()

    def files(self, workers: int, routers: int) -> None:
        """Counter files read at a tick."""
        self._files.labels("worker").set(workers)
        self._files.labels("router").set(routers)

    def faults(self, unreadable: int, backwards: int) -> None:
        """More faults of counter files."""
        self._faults.labels("unreadable").inc(unreadable)
        self._faults.labels("backwards").inc(backwards)


class AgentCollector(Collector):
    """The sample's rows as metrics. `state()`: (epoch, ranks, complete, monotonic time of the last whole one)."""

    def __init__(
        self, rows: Callable[[], list[RateRow]], state: Callable[[], tuple[int, int, bool, float | None]]
    ) -> None:
        self._rows, self._state = rows, state

    def collect(self) -> Iterable[Metric]:
        """Called at a scrape, in a thread of the metrics server."""
        epoch, ranks, complete, last_s = self._state()
        yield _gauge("megatoken_throughput_epoch", "Of the rank set in use.", epoch)
        yield _gauge("megatoken_throughput_ranks", "Ranks in that set.", ranks)
        yield _gauge("megatoken_throughput_complete", "1 when the last sample had every rank.", int(complete))
        if last_s is not None:
            age = max(time.monotonic() - last_s, 0.0)
            yield _gauge("megatoken_throughput_sample_age_seconds", "Since the last complete sample.", age)
        rows = self._rows()
        yield from _totals(rows)
        yield _energy(rows)
        yield from _rates(rows)
        efficiency = GaugeMetricFamily(
            "megatoken_throughput_efficiency_ratio",
            "Rate over the sum of the replicas' stand-alone rates.",
            labels=["scope", "name"],
        )
        for row in rows:
            if row.efficiency:
                efficiency.add_metric([row.kind, row.name], row.efficiency)
        yield efficiency


def _gauge(name: str, documentation: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, documentation, value=value)


def _totals(rows: list[RateRow]) -> Iterable[Metric]:
    for name, counter in TOKENS.items():
        family = CounterMetricFamily(
            f"megatoken_throughput_{name}_tokens",
            f"{name.capitalize()} tokens, as workers made them and as routers delivered them.",
            labels=["scope", "name", "ledger"],
        )
        for row in rows:
            family.add_metric([row.kind, row.name, "workers"], int(row.workers[INDEX[counter]]))
            if row.routers is not None:
                family.add_metric([row.kind, row.name, "routers"], int(row.routers[INDEX[counter]]))
        yield family


def _energy(rows: list[RateRow]) -> Metric:
    """Only of what has devices that tell."""
    family = CounterMetricFamily(
        "megatoken_throughput_energy_joules", "Used by devices that tell.", labels=["scope", "name"]
    )
    for row in rows:
        millijoules = int(row.workers[INDEX["energy_mj"]])
        if millijoules:
            family.add_metric([row.kind, row.name], millijoules / 1000)
    return family


def _rates(rows: list[RateRow]) -> Iterable[Metric]:
    for name in TOKENS:
        family = GaugeMetricFamily(
            f"megatoken_throughput_{name}_tokens_per_second",
            f"{name.capitalize()} tokens a second over a window.",
            labels=["scope", "name", "window"],
        )
        for row in rows:
            for rate in row.rates:
                family.add_metric([row.kind, row.name, WINDOW_NAMES[rate.seconds]], getattr(rate, name))
        yield family
