"""The cluster's tokens per second at every router: follows the node's throughput agent and passes its samples on.

A sample says everything itself (totals, windows, efficiency); nothing is computed here. While the agent is away the
last sample is served, and its age is in the metrics.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Final

import grpc
from grpc import aio
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from megatoken.errors import MegatokenError, UnavailableError, grpc_status
from megatoken.reconnect import Pauses, keep_connected
from megatoken.v1 import throughput_pb2, throughput_pb2_grpc

WATCH_S: Final = 60.0  # a stream is opened anew then: no call is without a deadline
RETRY_S: Final = 1.0
MAX_WATCHERS: Final = 256
WINDOWS: Final = {1: "1s", 10: "10s", 60: "1m", 300: "5m"}
SCOPES: Final = ("cluster", "site", "model")  # an agent exports nodes and replicas too
TOKENS: Final = ("generated", "prompt", "cached")


class ThroughputRelay(throughput_pb2_grpc.ThroughputServicer):
    """Holds the newest sample; `identify` checks a caller's key, as at the router's other services."""

    def __init__(self, identify: Callable[[Any], object]) -> None:
        self._identify = identify
        self.sample: throughput_pb2.ThroughputSample | None = None
        self.taken_s = 0.0
        self._watchers: set[asyncio.Event] = set()

    async def follow(self, agent: str, open_channel: Callable[[str], aio.Channel]) -> None:
        """Until cancelled: takes every sample of the agent at host:port. Never raises for one that is away."""

        async def watch() -> None:
            channel = open_channel(agent)
            try:
                stub = throughput_pb2_grpc.ThroughputStub(channel)
                async for sample in stub.WatchThroughput(throughput_pb2.GetThroughputRequest(), timeout=WATCH_S):
                    self.take(sample)
            finally:
                await channel.close(None)

        await keep_connected(watch, Pauses(longest_s=RETRY_S), lambda _error: None)

    def take(self, sample: throughput_pb2.ThroughputSample) -> None:
        """A newer sample came."""
        self.sample, self.taken_s = sample, time.monotonic()
        for watcher in self._watchers:
            watcher.set()

    async def GetThroughput(
        self, request: throughput_pb2.GetThroughputRequest, context: Any
    ) -> throughput_pb2.ThroughputSample:
        await self._admit(context)
        sample = self.sample
        if sample is None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "no throughput agent has answered this router yet")
            raise UnavailableError("unreachable: abort raises")
        return sample

    async def WatchThroughput(
        self, request: throughput_pb2.GetThroughputRequest, context: Any
    ) -> AsyncIterator[throughput_pb2.ThroughputSample]:
        await self._admit(context)
        if len(self._watchers) >= MAX_WATCHERS:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{MAX_WATCHERS} watch already")
        news = asyncio.Event()
        self._watchers.add(news)
        try:
            if self.sample is not None:
                yield self.sample
            while True:
                await news.wait()
                news.clear()
                if self.sample is not None:
                    yield self.sample
        finally:
            self._watchers.discard(news)

    async def _admit(self, context: Any) -> None:
        try:
            self._identify(context.invocation_metadata())
        except MegatokenError as error:
            await context.abort(*grpc_status(error))


class ClusterCollector(Collector):
    """The sample's cluster, site and model rows as metrics; docs/metrics.md, "Throughput"."""

    def __init__(self, relay: ThroughputRelay) -> None:
        self._relay = relay

    def describe(self) -> Iterator[Metric]:
        """Nothing ahead of time."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """The newest sample; nothing before there is one."""
        sample = self._relay.sample
        if sample is None:
            return
        for name, text, value in (
            ("epoch", "Of the rank set in use.", sample.epoch),
            ("ranks", "In that set.", sample.ranks),
            ("complete", "1 when the last sample had every rank.", int(sample.complete)),
            ("sample_age_seconds", "Since the last sample came here.", time.monotonic() - self._relay.taken_s),
        ):
            yield GaugeMetricFamily(f"megatoken_throughput_{name}", text, value=value)
        rows = [row for row in sample.rows if row.kind in SCOPES]
        for tokens in TOKENS:
            yield _totals(tokens, rows)
            yield _rates(tokens, rows)
        efficiency = GaugeMetricFamily(
            "megatoken_throughput_efficiency_ratio", "Rate over the stand-alone rates.", labels=["scope", "name"]
        )
        for row in rows:
            if row.efficiency:
                efficiency.add_metric([row.kind, row.name], row.efficiency)
        yield efficiency


def _totals(tokens: str, rows: list[throughput_pb2.ThroughputRow]) -> Metric:
    family = CounterMetricFamily(
        f"megatoken_throughput_{tokens}_tokens",
        f"{tokens.capitalize()} tokens, as workers made them and as routers delivered them.",
        labels=["scope", "name", "ledger"],
    )
    for row in rows:
        for ledger in ("workers", "routers"):
            if row.HasField(ledger):
                family.add_metric([row.kind, row.name, ledger], getattr(getattr(row, ledger), f"{tokens}_tokens"))
    return family


def _rates(tokens: str, rows: list[throughput_pb2.ThroughputRow]) -> Metric:
    family = GaugeMetricFamily(
        f"megatoken_throughput_{tokens}_tokens_per_second",
        f"{tokens.capitalize()} tokens a second over a window.",
        labels=["scope", "name", "window"],
    )
    for row in rows:
        for window in row.windows:
            label = WINDOWS.get(window.seconds)
            if label is not None:
                family.add_metric([row.kind, row.name, label], getattr(window, f"{tokens}_tokens_per_s"))
    return family
