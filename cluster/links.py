"""The controller's gRPC clients: loads of workers, drains, routers' queues, the agents' sample. Decides nothing.

Every call has a deadline, channels are kept per address and closed when their replica is gone, and what was last read
stays until it is read again, so that status never waits for a slow worker.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

from cluster.fleet import Replica
from cluster.status import Readings
from megatoken.access.channel import Present, presenting
from megatoken.tls import ClientTls, open_channel
from megatoken.v1 import (
    router_pb2,
    router_pb2_grpc,
    throughput_pb2,
    throughput_pb2_grpc,
    tokens_pb2,
    worker_pb2,
    worker_pb2_grpc,
)

CALL_TIMEOUT_S = 2.0
CONCURRENT_CALLS = 64
RATE_SMOOTHING_S = 3.0  # time constant of the tokens/s that status shows where no agent sums them


@dataclass
class _Meter:
    """Turns a monotonic total into a smoothed rate."""

    total: int
    at_s: float
    rate: float = 0.0

    def read(self, total: int, at_s: float) -> float:
        elapsed_s = at_s - self.at_s
        if elapsed_s <= 0:
            return self.rate
        weight = min(1.0, elapsed_s / RATE_SMOOTHING_S)
        self.rate += weight * (max(0, total - self.total) / elapsed_s - self.rate)
        self.total, self.at_s = total, at_s
        return self.rate


class Links:
    """Lives in the controller's event loop."""

    def __init__(self, tls: ClientTls | None, present: Present | None = None) -> None:
        self._tls, self._present = tls, present
        self._channels: dict[str, Any] = {}
        self._loads: dict[str, tokens_pb2.Load] = {}
        self._meters: dict[str, _Meter] = {}
        self._queued: dict[str, int] = {}
        self._slots = asyncio.Semaphore(CONCURRENT_CALLS)
        self.sample = throughput_pb2.ThroughputSample()
        self.unfinished: dict[str, int] = {}
        """By draining replica: the requests its worker still had when last told to drain."""

    def readings(self) -> Readings:
        rates = {replica: meter.rate for replica, meter in self._meters.items()}
        return Readings(dict(self._loads), rates, sum(self._queued.values()))

    async def read_loads(self, replicas: Iterable[Replica], now: float) -> None:
        """Asks every serving worker for its load; forgets those that are gone."""
        serving = {replica.id: replica for replica in replicas if replica.facts is not None and replica.live}
        for gone in self._loads.keys() - serving.keys():
            self._loads.pop(gone)
            self._meters.pop(gone, None)
            self.unfinished.pop(gone, None)
        await asyncio.gather(*(self._read_load(replica, now) for replica in serving.values()))

    async def _read_load(self, replica: Replica, now: float) -> None:
        if replica.facts is None:
            return
        async with self._slots:
            try:
                stub = worker_pb2_grpc.WorkerStub(self._channel(replica.facts.address))
                load = await stub.GetLoad(worker_pb2.GetLoadRequest(), timeout=CALL_TIMEOUT_S)
            except grpc.aio.AioRpcError:
                return  # Ray tells when it is dead
        self._loads[replica.id] = load
        meter = self._meters.setdefault(replica.id, _Meter(load.generated_tokens, now))
        meter.read(load.generated_tokens, now)

    async def tell_drain(self, replica: Replica) -> None:
        """Tells a worker to refuse new requests, and keeps how many it still has."""
        if replica.facts is None:
            return
        try:
            stub = worker_pb2_grpc.WorkerStub(self._channel(replica.facts.address))
            reply = await stub.Drain(worker_pb2.DrainRequest(), timeout=CALL_TIMEOUT_S)
        except grpc.aio.AioRpcError:
            return  # told again at the next tick
        self.unfinished[replica.id] = reply.running

    async def read_routers(self, addresses: Mapping[str, str]) -> None:
        """Asks routers (name -> address) for their queues."""
        for gone in self._queued.keys() - addresses.keys():
            self._queued.pop(gone)
        for name, address in addresses.items():
            try:
                stub = router_pb2_grpc.RouterStub(self._channel(address))
                status = await stub.GetRouterStatus(router_pb2.GetRouterStatusRequest(), timeout=CALL_TIMEOUT_S)
            except grpc.aio.AioRpcError:
                continue
            self._queued[name] = status.queued

    async def read_throughput(self, addresses: Iterable[str]) -> None:
        """Takes the newest sample from the first agent that answers."""
        for address in addresses:
            try:
                stub = throughput_pb2_grpc.ThroughputStub(self._channel(address))
                self.sample = await stub.GetThroughput(throughput_pb2.GetThroughputRequest(), timeout=CALL_TIMEOUT_S)
            except grpc.aio.AioRpcError:
                continue
            return

    async def keep_only(self, addresses: Iterable[str]) -> None:
        """Closes the channels to every other address."""
        for address in self._channels.keys() - set(addresses):
            await self._channels.pop(address).close()

    async def close(self) -> None:
        await self.keep_only(())

    def _channel(self, address: str) -> Any:
        if address not in self._channels:
            self._channels[address] = presenting(open_channel(address, self._tls), self._present)
        return self._channels[address]
