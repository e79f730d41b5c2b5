"""A small controller and real agents on loopback, for tests and the throughput benchmark.

The controller serves Membership.Watch and the shipped ThroughputAttendance, and nothing else. It can be stopped and
started again on the same port, and can be told to publish any group.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import grpc

from megatoken.counters import INDEX, CounterWriter
from megatoken.tls import ServerTls, bind
from megatoken.v1 import membership_pb2, membership_pb2_grpc, throughput_pb2, throughput_pb2_grpc
from megatoken.worker.throughput.attendance import AttendanceServicer
from megatoken.worker.throughput.decide.group import GroupPolicy
from tests.support.processes import LeftBehind, Processes, Started


class FakeController(membership_pb2_grpc.MembershipServicer):
    """Membership and attendance on one port."""

    def __init__(self, policy: GroupPolicy | None = None, decide: bool = True) -> None:
        self._policy, self._decide = policy, decide
        self._server: grpc.aio.Server | None = None
        self._changed = asyncio.Condition()
        self.snapshot = membership_pb2.Snapshot(epoch=1, version=1)
        self.groups: list[tuple[float, membership_pb2.ThroughputGroup]] = []
        self.host, self.port = "127.0.0.1", 0
        self.tls: ServerTls | None = None
        self.attendance: AttendanceServicer

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    async def start(self) -> None:
        self._server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
        decided = self.publish if self._decide else lambda group, why: None  # a test publishes by itself
        self.attendance = AttendanceServicer(decided, self._policy)
        self.attendance.attach(self._server)
        membership_pb2_grpc.add_MembershipServicer_to_server(self, self._server)
        self.port = bind(self._server, self.address, self.tls)
        await self._server.start()
        await self.attendance.start()

    async def stop(self) -> None:
        await self.attendance.stop()
        assert self._server is not None
        await self._server.stop(0)
        self._server = None

    def publish(self, group: membership_pb2.ThroughputGroup, why: str) -> None:
        self.groups.append((time.monotonic(), group))
        self.snapshot.throughput.CopyFrom(group)
        self.push()

    def push(self) -> None:
        """Sends the snapshot as it stands as a new version."""
        self.snapshot.version += 1
        asyncio.get_running_loop().create_task(self._notify())

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def Watch(self, request: membership_pb2.WatchRequest, context: Any) -> AsyncIterator[membership_pb2.Snapshot]:
        seen = (request.epoch, request.version)
        while True:
            async with self._changed:
                while (self.snapshot.epoch, self.snapshot.version) <= seen:
                    await self._changed.wait()
            seen = (self.snapshot.epoch, self.snapshot.version)
            yield self.snapshot


class Agents:
    """Real agent processes, each with counters of its own."""

    def __init__(self, controller: FakeController, directory: Path, **config: Any) -> None:
        self.controller, self._directory, self._config = controller, directory, config
        self._processes: list[Processes] = []  # one a start: they may run side by side
        self.running: dict[str, Started] = {}
        self._channels: dict[str, grpc.aio.Channel] = {}

    def counters_dir(self, node: str) -> Path:
        return self._directory / node / "counters"

    def writer(self, node: str, name: str, incarnation: int = 1, kind: str = "worker", **header: Any) -> CounterWriter:
        """A counter file as a worker or router on that node would keep."""
        facts = {"kind": kind, "id": name, "incarnation": incarnation, "model": "tiny" if kind == "worker" else ""}
        facts |= {"engine": "simulated", "device_kind": "cpu", "devices": 1, "node": node, "site": ""}
        return CounterWriter(self.counters_dir(node) / f"{name}.{incarnation}.counters", {**facts, **header})

    async def start(self, node: str, prefix: tuple[str, ...] = (), **config: Any) -> Started:
        """Starts the node's agent; its ready line may take an import of torch. `prefix` may enter a namespace."""
        facts = {"node": node, "controllers": [self.controller.address], "counters_dir": str(self.counters_dir(node))}
        facts = {**facts, "unguarded": True, **self._config, **config}
        processes = Processes(self._directory / f"processes-{len(self._processes)}")
        self._processes.append(processes)
        started = await asyncio.to_thread(processes.start, "worker.throughput", facts, prefix=prefix)
        self.running[node] = started
        self._channels[node] = grpc.aio.insecure_channel(started.address)
        return started

    async def start_all(self, nodes: Sequence[str], **config: Any) -> None:
        await asyncio.gather(*(self.start(node, **config) for node in nodes))

    async def sample(self, node: str, timeout_s: float = 5.0) -> throughput_pb2.ThroughputSample:
        stub = throughput_pb2_grpc.ThroughputStub(self._channels[node])
        return await stub.GetThroughput(throughput_pb2.GetThroughputRequest(), timeout=timeout_s)

    @contextlib.asynccontextmanager
    async def watch(self, node: str) -> AsyncIterator[AsyncIterator[throughput_pb2.ThroughputSample]]:
        """The node's stream of samples; ends with the block."""
        stub = throughput_pb2_grpc.ThroughputStub(self._channels[node])
        call = stub.WatchThroughput(throughput_pb2.GetThroughputRequest())
        try:
            yield call
        finally:
            call.cancel()

    async def until(
        self, node: str, wanted: Callable[[throughput_pb2.ThroughputSample], bool], timeout_s: float = 30.0
    ) -> throughput_pb2.ThroughputSample:
        """The first sample that is wanted. Raises AssertionError with the last one seen."""
        sample = None
        try:
            async with asyncio.timeout(timeout_s), self.watch(node) as samples:
                async for sample in samples:
                    if wanted(sample):
                        return sample
        except TimeoutError:
            raise AssertionError(f"{node}: no such sample within {timeout_s} s; the last was {sample}") from None
        raise AssertionError(f"{node}: its stream ended")

    async def until_ranks(self, nodes: Sequence[str], timeout_s: float = 30.0) -> None:
        """Waits until every node's sample is complete with exactly these ranks."""
        for node in nodes:
            await self.until(node, lambda s: s.complete and s.ranks == len(nodes), timeout_s)

    def signal(self, node: str, number: signal.Signals) -> None:
        os.kill(self.running[node].pid, number)

    async def kill(self, node: str) -> None:
        """kill -9 of the agent; its counters stay."""
        await self._channels.pop(node).close()
        self.running.pop(node).kill()

    async def close(self) -> None:
        """Stops all. Raises LeftBehind when an agent left a process of its own."""
        for channel in self._channels.values():
            await channel.close()
        problems = []
        for processes in self._processes:
            try:
                await asyncio.to_thread(processes.stop)
            except LeftBehind as problem:
                problems.append(problem)
        if problems:
            raise problems[0]


def row(sample: throughput_pb2.ThroughputSample, kind: str, name: str) -> throughput_pb2.ThroughputRow:
    """One row of a sample."""
    return next(row for row in sample.rows if (row.kind, row.name) == (kind, name))


def count(writer: CounterWriter, **more: int) -> None:
    """Adds to counters by name."""
    for name, value in more.items():
        writer.totals[INDEX[name]] += value


@contextlib.asynccontextmanager
async def running(
    directory: Path,
    policy: GroupPolicy | None = None,
    decide: bool = True,
    controller_host: str = "127.0.0.1",
    **config: Any,
) -> AsyncIterator[Agents]:
    """A controller and no agents yet; stops all at the end. Further words are the agents' config."""
    controller = FakeController(policy, decide)
    controller.host = controller_host
    await controller.start()
    agents = Agents(controller, directory, **config)
    try:
        yield agents
    finally:
        try:
            await agents.close()
        finally:
            await controller.stop()
