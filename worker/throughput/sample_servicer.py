"""The latest sample, and the Throughput service that serves it.

A sample becomes a message when somebody asks, once a tick however many ask: rows cost Python per replica, and most
ticks of most agents are asked for by nobody.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any, Final

import grpc

from megatoken.counters import NAMES
from megatoken.v1 import throughput_pb2, throughput_pb2_grpc
from megatoken.worker.throughput.decide.ledger import Totals
from megatoken.worker.throughput.decide.rates import ClusterRates, RateRow

MAX_WATCHERS: Final = 256


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the latest tick ended."""

    epoch: int = 0
    tick: int = 0
    unix_s: float = 0.0
    complete: bool = False
    incomplete_reason: str = "no tick yet"
    ranks: int = 0
    collective_s: float = 0.0
    backend: str = ""


class SampleServicer(throughput_pb2_grpc.ThroughputServicer):
    """Holds the outcome and serves it with the rates' rows."""

    def __init__(self, rates: ClusterRates) -> None:
        self._rates = rates
        self.outcome = Outcome()
        self._rows: list[throughput_pb2.ThroughputRow] | None = None
        self._watchers: set[asyncio.Event] = set()

    def post(self, outcome: Outcome) -> None:
        """A tick ended. The rates were updated before, when it is complete."""
        self.outcome = outcome
        if outcome.complete:
            self._rows = None
        for watcher in self._watchers:
            watcher.set()

    def retract(self, reason: str) -> None:
        """The last sample is not of the present epoch any more; keeps its totals."""
        self.outcome = replace(self.outcome, complete=False, incomplete_reason=reason)

    def sample(self) -> throughput_pb2.ThroughputSample:
        """The latest sample with every row."""
        if self._rows is None:
            self._rows = [row_message(row) for row in self._rates.rows()]
        outcome = self.outcome
        return throughput_pb2.ThroughputSample(
            epoch=outcome.epoch,
            tick=outcome.tick,
            unix_s=outcome.unix_s,
            complete=outcome.complete,
            incomplete_reason=outcome.incomplete_reason,
            ranks=outcome.ranks,
            collective_s=outcome.collective_s,
            backend=outcome.backend,
            rows=self._rows,
        )

    async def GetThroughput(
        self, request: throughput_pb2.GetThroughputRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> throughput_pb2.ThroughputSample:
        """The latest sample."""
        return self.sample()

    async def WatchThroughput(
        self, request: throughput_pb2.GetThroughputRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[throughput_pb2.ThroughputSample]:
        """The latest sample, then each new one; a slow client skips to the newest."""
        if len(self._watchers) >= MAX_WATCHERS:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{MAX_WATCHERS} clients watch already")
        posted = asyncio.Event()
        self._watchers.add(posted)
        try:
            while True:
                posted.clear()
                yield self.sample()
                await posted.wait()
        finally:
            self._watchers.discard(posted)


def totals_message(totals: Totals) -> throughput_pb2.Totals:
    """Totals in the order of NAMES as a message: its fields have the same names."""
    return throughput_pb2.Totals(**dict(zip(NAMES, totals.tolist(), strict=True)))


def row_message(row: RateRow) -> throughput_pb2.ThroughputRow:
    """One row as a message."""
    windows = [
        throughput_pb2.Window(
            seconds=rate.seconds,
            generated_tokens_per_s=rate.generated,
            prompt_tokens_per_s=rate.prompt,
            cached_tokens_per_s=rate.cached,
        )
        for rate in row.rates
    ]
    return throughput_pb2.ThroughputRow(
        kind=row.kind,
        name=row.name,
        workers=totals_message(row.workers),
        routers=totals_message(row.routers) if row.routers is not None else None,
        windows=windows,
        efficiency=row.efficiency,
        engine=row.engine,
    )
