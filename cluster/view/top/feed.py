"""Fetches what `megatoken top` shows: GetStatus each second, throughput and events as streams, routers' own accounts.

Keeps the last answer of each and how long the controller has been silent; nothing here ends the view. Decides nothing
about what is shown (view.py). All calls have a deadline, all histories a bound.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final

import grpc

from megatoken.cluster.view.top.view import Inputs, cluster_rate
from megatoken.reconnect import Pauses, keep_connected
from megatoken.v1 import control_pb2, control_pb2_grpc, router_pb2, router_pb2_grpc, throughput_pb2, throughput_pb2_grpc

POLL_S: Final = 1.0
ROUTER_POLL_S: Final = 2.0
CALL_TIMEOUT_S: Final = 5.0
RETRY_S: Final = 2.0  # between attempts at a stream that broke
STREAM_S: Final = 3600.0  # a stream is opened anew then: no call is without a deadline
HISTORY: Final = 600  # ten minutes of samples
EVENTS_KEPT: Final = 500
MAX_ROUTERS: Final = 16  # asked for their percentiles

OpenChannel = Callable[[str], grpc.aio.Channel]


class Feed:
    """Runs until `close`. `open_channel` makes a channel to host:port with the cluster's own credentials."""

    def __init__(self, control_address: str, open_channel: OpenChannel) -> None:
        self._open_channel = open_channel
        self._channel = open_channel(control_address)
        self._control = control_pb2_grpc.ControlStub(self._channel)
        self._throughput = throughput_pb2_grpc.ThroughputStub(self._channel)
        self._router_channels: dict[str, grpc.aio.Channel] = {}
        self._status = control_pb2.ClusterStatus()
        self._sample: throughput_pb2.ThroughputSample | None = None
        self._sample_at_s = 0.0
        self._routers: dict[str, router_pb2.RouterStatus] = {}
        self._history: deque[float] = deque(maxlen=HISTORY)
        self._answered_s = time.monotonic()
        self._reason = ""
        self._tasks: list[asyncio.Task[None]] = []
        self.events: deque[control_pb2.Event] = deque(maxlen=EVENTS_KEPT)
        self.changed = asyncio.Event()  # set after each answer; the reader clears it

    def start(self) -> None:
        """Begins to fetch, on the running loop."""
        loops = (self._poll_status, self._follow_throughput, self._follow_events, self._poll_routers)
        self._tasks = [asyncio.create_task(loop()) for loop in loops]

    async def close(self) -> None:
        """Stops fetching and closes every channel."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for channel in (self._channel, *self._router_channels.values()):
            await channel.close(None)

    def inputs(self) -> Inputs:
        """Everything known now."""
        silent_s = time.monotonic() - self._answered_s
        fresh = self._sample is not None and time.monotonic() - self._sample_at_s < 3 * CALL_TIMEOUT_S
        return Inputs(
            status=self._status,
            sample=self._sample if fresh else None,
            routers=dict(self._routers),
            history=tuple(self._history),
            unreachable_s=silent_s if self._reason else 0.0,
            reason=self._reason,
        )

    async def drain(self, replica: str) -> None:
        """Asks the controller to take a replica out of service. Raises grpc.aio.AioRpcError."""
        await self._control.DrainTarget(control_pb2.DrainTargetRequest(replica=replica), timeout=CALL_TIMEOUT_S)

    async def scale(self, model: str, replicas: int) -> None:
        """Asks the controller for that many replicas. Raises grpc.aio.AioRpcError."""
        await self._control.Scale(control_pb2.ScaleRequest(model=model, replicas=replicas), timeout=CALL_TIMEOUT_S)

    async def _poll_status(self) -> None:
        while True:
            try:
                self._status = await self._control.GetStatus(control_pb2.GetStatusRequest(), timeout=CALL_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                self._reason = (error.details() or error.code().name).splitlines()[0][:60]
            else:
                self._reason, self._answered_s = "", time.monotonic()
                if self._status.HasField("throughput") and self._status.throughput.rows:
                    self._take_sample(self._status.throughput)
                elif (rate := cluster_rate(Inputs(status=self._status))) is not None and self._sample is None:
                    self._history.append(rate)
            self.changed.set()
            await asyncio.sleep(POLL_S)

    def _take_sample(self, sample: throughput_pb2.ThroughputSample) -> None:
        """Takes a sample that is newer than the last; status and stream both bring them."""
        if self._sample is not None and sample.unix_s <= self._sample.unix_s:
            return
        self._sample, self._sample_at_s = sample, time.monotonic()
        rate = cluster_rate(Inputs(sample=sample))
        if rate is not None:
            self._history.append(rate)

    async def _follow_throughput(self) -> None:
        async def read() -> None:
            request = throughput_pb2.GetThroughputRequest()
            async for sample in self._throughput.WatchThroughput(request, timeout=STREAM_S):
                self._take_sample(sample)
                self.changed.set()

        await keep_connected(read, Pauses(longest_s=RETRY_S), _unless_away)

    async def _follow_events(self) -> None:
        async def read() -> None:
            # From the first one each time: a restarted controller counts anew. What is known is replaced.
            known: deque[control_pb2.Event] = deque(maxlen=EVENTS_KEPT)
            request = control_pb2.WatchEventsRequest(follow=True)
            async for event in self._control.WatchEvents(request, timeout=STREAM_S):
                known.append(event)
                self.events = known
                self.changed.set()

        await keep_connected(read, Pauses(longest_s=RETRY_S), _unless_away)

    async def _poll_routers(self) -> None:
        while True:
            processes = self._status.processes
            routers = {one.name: one.own_address or one.address for one in processes if one.kind == "router"}
            wanted = dict(sorted((name, address) for name, address in routers.items() if address)[:MAX_ROUTERS])
            answers = await asyncio.gather(*(self._ask_router(address) for address in wanted.values()))
            self._routers = {name: answer for name, answer in zip(wanted, answers, strict=True) if answer is not None}
            for address in set(self._router_channels) - set(wanted.values()):
                await self._router_channels.pop(address).close(None)
            await asyncio.sleep(ROUTER_POLL_S)

    async def _ask_router(self, address: str) -> router_pb2.RouterStatus | None:
        channel = self._router_channels.get(address)
        if channel is None:
            channel = self._router_channels[address] = self._open_channel(address)
        call: Awaitable[router_pb2.RouterStatus] = router_pb2_grpc.RouterStub(channel).GetRouterStatus(
            router_pb2.GetRouterStatusRequest(), timeout=CALL_TIMEOUT_S
        )
        try:
            return await call
        except grpc.aio.AioRpcError:
            return None


def _unless_away(error: Exception) -> None:
    """A stream that ends or breaks is opened again; anything else is a fault."""
    if not isinstance(error, grpc.aio.AioRpcError):
        raise error
