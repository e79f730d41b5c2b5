"""The controller's gRPC clients: workers' leases and loads, drains, routers' queues, agents' samples. Decides nothing.

Every call has a deadline, channels are kept per address and closed when their replica is gone, and what was last read
stays until it is read again, so that status never waits for a slow worker.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

from megatoken.access.channel import Present, presenting
from megatoken.cluster.controller.status import Readings
from megatoken.cluster.decide.fleet import Replica, ranks_by_node
from megatoken.cluster.decide.liveness import Answered, Liveness, LivenessLimits
from megatoken.cluster.inventory.topology import CPU_KIND
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
FRESH_S = 5.0
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
        self.routers: dict[str, router_pb2.RouterStatus] = {}
        self._routers_read_s: dict[str, float] = {}
        """By name: what each last said."""
        self._probes: set[asyncio.Task[None]] = set()
        self._renewals: dict[str, asyncio.Task[None]] = {}
        """By replica: the renewal that is on its way."""
        self.liveness = Liveness()
        self._slots = asyncio.Semaphore(CONCURRENT_CALLS)
        self.sample = throughput_pb2.ThroughputSample()
        self.unfinished: dict[str, int] = {}
        """By draining replica: the requests its worker still had when last told to drain."""

    def readings(self) -> Readings:
        rates = {replica: meter.rate for replica, meter in self._meters.items()}
        return Readings(dict(self._loads), rates, sum(router.queued for router in self.routers.values()))

    def renew(self, replicas: Iterable[Replica], limits: LivenessLimits) -> None:
        """Begins to renew every serving worker's lease and take its load; forgets those that are gone, probes the idle.

        Called about once a second.
        """
        replicas = list(replicas)
        ranks = ranks_by_node(replicas)
        serving = {replica.id: replica for replica in replicas if replica.facts is not None and replica.live}
        self.liveness.serves(serving, time.monotonic())
        for gone in self._loads.keys() - serving.keys():
            self._loads.pop(gone)
            self._meters.pop(gone, None)
            self.unfinished.pop(gone, None)
        for replica in serving.values():
            if replica.id not in self._renewals:  # one that does not answer keeps no other waiting
                renewal = asyncio.create_task(self._renew(replica, limits.lease_s, _cpu_ranks(replica, ranks)))
                self._renewals[replica.id] = renewal
                renewal.add_done_callback(functools.partial(self._renewed, replica.id))
        for replica_id in self.liveness.to_probe(limits, time.monotonic()):
            probe = asyncio.create_task(self._probe(serving[replica_id], limits.hang_s))
            self._probes.add(probe)
            probe.add_done_callback(self._probes.discard)

    def _renewed(self, replica_id: str, _renewal: asyncio.Task[None]) -> None:
        self._renewals.pop(replica_id, None)

    async def _renew(self, replica: Replica, lease_s: float, cpu_ranks: int) -> None:
        """Renews once; at the first time twice, since only the second has a moment to count from."""
        first = not self.liveness.stamp_s(replica.id)
        if await self._renew_once(replica, lease_s, cpu_ranks) and first:
            await self._renew_once(replica, lease_s, cpu_ranks)

    async def _renew_once(self, replica: Replica, lease_s: float, cpu_ranks: int) -> bool:
        """Whether the worker answered."""
        if replica.facts is None:
            return False
        request = worker_pb2.RenewRequest(
            stamp_s=self.liveness.stamp_s(replica.id),
            lease_s=lease_s,
            replica=replica.id,
            incarnation=replica.facts.incarnation,
            cpu_ranks=cpu_ranks,
        )
        async with self._slots:
            try:
                stub = worker_pb2_grpc.WorkerStub(self._channel(replica.facts.address))
                reply = await stub.Renew(request, timeout=CALL_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                await self._give_up(replica.facts.address, error)
                return False  # its silence is what counts
        now, load = time.monotonic(), reply.load
        self.liveness.answered(replica.id, Answered(reply.stamp_s, load.steps, reply.unfinished, now))
        self._loads[replica.id] = load
        meter = self._meters.setdefault(replica.id, _Meter(load.generated_tokens, now))
        meter.read(load.generated_tokens, now)
        return True

    async def _probe(self, replica: Replica, timeout_s: float) -> None:
        """Asks an idle engine for a token: of no request, and in no total."""
        if replica.facts is None:
            return
        asked_s = time.monotonic()
        stub = worker_pb2_grpc.WorkerStub(self._channel(replica.facts.address))
        try:
            await stub.Probe(worker_pb2.ProbeRequest(), timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:  # any other is the worker's silence, or its end
                self.liveness.probe_failed(replica.id, asked_s)

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
        for gone in self.routers.keys() - addresses.keys():
            self.routers.pop(gone)
            self._routers_read_s.pop(gone, None)
        for name, address in addresses.items():
            try:
                stub = router_pb2_grpc.RouterStub(self._channel(address))
                status = await stub.GetRouterStatus(router_pb2.GetRouterStatusRequest(), timeout=CALL_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                await self._give_up(address, error)
                continue
            self.routers[name], self._routers_read_s[name] = status, time.monotonic()

    def answering_routers(self, now: float) -> dict[str, router_pb2.RouterStatus]:
        """What the routers say that answered lately: what waits in one that is lost waits no more."""
        return {name: status for name, status in self.routers.items() if now - self._routers_read_s[name] <= FRESH_S}

    async def read_throughput(self, addresses: Iterable[str]) -> None:
        """Takes the newest sample from the first agent that answers."""
        for address in addresses:
            try:
                stub = throughput_pb2_grpc.ThroughputStub(self._channel(address))
                self.sample = await stub.GetThroughput(throughput_pb2.GetThroughputRequest(), timeout=CALL_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                await self._give_up(address, error)
                continue
            return

    async def keep_only(self, addresses: Iterable[str]) -> None:
        """Closes the channels to every other address."""
        for address in self._channels.keys() - set(addresses):
            await self._channels.pop(address).close()

    async def close(self) -> None:
        running = [*self._probes, *self._renewals.values()]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await self.keep_only(())

    async def _give_up(self, address: str, error: grpc.aio.AioRpcError) -> None:
        """Closes a channel that does not connect: it has certificates of when it was opened, the next has today's."""
        if error.code() is grpc.StatusCode.UNAVAILABLE and address in self._channels:
            await self._channels.pop(address).close()

    def _channel(self, address: str) -> Any:
        if address not in self._channels:
            self._channels[address] = presenting(open_channel(address, self._tls), self._present)
        return self._channels[address]


def _cpu_ranks(replica: Replica, ranks: Mapping[str, int]) -> int:
    """Ranks on its busiest node; 0 where it does not compute on the CPU."""
    placement = replica.placement
    return max(ranks[node] for node in placement.nodes) if placement.ranks[0].kind == CPU_KIND else 0
