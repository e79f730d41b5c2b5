"""The controller's gRPC services: Control and Membership. Decode, call the controller, encode; nothing else."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias, TypeVar

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from megatoken.access.gate import Gate
from megatoken.access.table import Program
from megatoken.cluster.controller.loop import Controller
from megatoken.cluster.controller.monitoring.history import KEPT_S
from megatoken.cluster.spec.load import MAX_SPEC_BYTES, load_spec
from megatoken.errors import MegatokenError, RequestError, grpc_status
from megatoken.tls import ServerTls, bind
from megatoken.v1 import (
    control_pb2,
    control_pb2_grpc,
    membership_pb2,
    membership_pb2_grpc,
    throughput_pb2,
    throughput_pb2_grpc,
)

MAX_REPLICAS = 100_000
MAX_REASON = 200
MAX_LOG_LINES = 100_000
MAX_MESSAGE_BYTES = 16 << 20
LOG_FOLLOW_S = 0.5
STOP_GRACE_S = 1.0
WATCHERS_MAX = 10_000
MIN_PING_MS = 1000  # more often is taken for abuse and ends the connection

Reply = TypeVar("Reply")
Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]


async def answered(context: Context, work: Callable[[], Awaitable[Reply]]) -> Reply:
    """Runs `work`; one of our errors becomes its gRPC status."""
    try:
        return await work()
    except MegatokenError as error:
        code, text = grpc_status(error)
        await context.abort(code, text)
        raise  # abort raises; this tells the type checker


class ControlServicer(control_pb2_grpc.ControlServicer):
    """What an operator asks."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller
        self._applying = asyncio.Lock()  # one spec at a time is read, and they are applied in the order they came

    async def Apply(self, request: control_pb2.ApplyRequest, context: Context) -> control_pb2.ApplyResponse:
        async def work() -> control_pb2.ApplyResponse:
            desired_state = self._controller.desired_state
            async with self._applying:
                spec = await asyncio.to_thread(load_spec, request.spec_yaml)  # a large one takes a second
                generation, changes = desired_state.apply(spec, self._controller.fleet, dry_run=request.dry_run)
            return control_pb2.ApplyResponse(generation=generation, changes=changes)

        return await answered(context, work)

    async def Scale(self, request: control_pb2.ScaleRequest, context: Context) -> control_pb2.ScaleResponse:
        async def work() -> control_pb2.ScaleResponse:
            if request.replicas > MAX_REPLICAS:
                raise RequestError("replicas", request.replicas, f"at most {MAX_REPLICAS}")
            state = self._controller.desired_state
            if request.dry_run:
                changes = self._controller.preview(state.scaled(request.model, request.replicas))
                return control_pb2.ScaleResponse(generation=state.desired.generation, changes=changes)
            return control_pb2.ScaleResponse(generation=state.scale(request.model, request.replicas))

        return await answered(context, work)

    async def DrainTarget(
        self, request: control_pb2.DrainTargetRequest, context: Context
    ) -> control_pb2.DrainTargetResponse:
        async def work() -> control_pb2.DrainTargetResponse:
            timeout_s = request.timeout_s if request.HasField("timeout_s") else None
            if timeout_s is not None and not 0 <= timeout_s <= 86_400:
                raise RequestError("timeout_s", timeout_s, "0 to 86400")
            desired_state = self._controller.desired_state
            match request.WhichOneof("target"):
                case "replica" if request.undo:
                    raise RequestError("undo", True, "nodes only: a drained replica is replaced, not taken back")
                case "replica":
                    replicas = desired_state.drain_replica(request.replica, timeout_s, self._controller.fleet)
                case "node":
                    inventory, fleet = self._controller.inventory, self._controller.fleet
                    replicas = desired_state.drain_node(request.node, inventory, fleet, undo=request.undo)
                case _:
                    raise RequestError("target", "", "a replica or a node")
            return control_pb2.DrainTargetResponse(replicas=replicas)

        return await answered(context, work)

    async def Cordon(self, request: control_pb2.CordonRequest, context: Context) -> control_pb2.CordonResponse:
        async def work() -> control_pb2.CordonResponse:
            desired_state, inventory = self._controller.desired_state, self._controller.inventory
            if len(request.reason) > MAX_REASON:
                raise RequestError("reason", f"{request.reason[:20]}...", f"at most {MAX_REASON} characters")
            if request.undo:
                desired_state.uncordon(request.node, request.device, inventory)
                return control_pb2.CordonResponse()
            fleet = self._controller.fleet
            replicas = desired_state.cordon(request.node, request.device, request.reason, inventory, fleet)
            return control_pb2.CordonResponse(replicas=replicas)

        return await answered(context, work)

    async def GetStatus(self, request: control_pb2.GetStatusRequest, context: Context) -> control_pb2.ClusterStatus:
        return self._controller.status()

    async def GetHistory(self, request: control_pb2.GetHistoryRequest, context: Context) -> control_pb2.History:
        async def work() -> control_pb2.History:
            if not 0 < request.seconds <= KEPT_S:
                raise RequestError("seconds", request.seconds, f"more than 0, at most {KEPT_S:.0f}")
            since_s = time.time() - request.seconds
            events = [event async for event in self._controller.events.read(0, follow=False) if event.unix_s > since_s]
            return control_pb2.History(points=self._controller.history.points(since_s), events=events)

        return await answered(context, work)

    async def WatchEvents(
        self, request: control_pb2.WatchEventsRequest, context: Context
    ) -> AsyncIterator[control_pb2.Event]:
        async for event in self._controller.events.read(request.after_sequence, follow=request.follow):
            yield event

    async def GetLogs(
        self, request: control_pb2.GetLogsRequest, context: Context
    ) -> AsyncIterator[control_pb2.LogChunk]:
        lines = min(request.lines or 200, MAX_LOG_LINES)
        shown: list[str] = []
        while True:
            text = await answered(context, lambda: self._tail(request.name, lines))
            now = text.splitlines()
            fresh = new_lines(shown, now)
            if fresh:
                yield control_pb2.LogChunk(text="\n".join(fresh) + "\n")
            shown = now
            if not request.follow or self._controller.closed.is_set():
                return
            await asyncio.sleep(LOG_FOLLOW_S)

    async def _tail(self, name: str, lines: int) -> str:
        if name in ("", "controller"):
            return "\n".join(list(self._controller.log_lines)[-lines:])
        return await self._controller.tail(name, lines)

    async def Shutdown(self, request: control_pb2.ShutdownRequest, context: Context) -> control_pb2.ShutdownResponse:
        timeout_s = max(0.0, min(request.drain_timeout_s, 86_400.0))
        self._controller.desired_state.shut_down(timeout_s, self._controller.fleet)
        return control_pb2.ShutdownResponse()

    async def RotateTokens(
        self, request: control_pb2.RotateTokensRequest, context: Context
    ) -> control_pb2.RotateTokensResponse:
        async def work() -> control_pb2.RotateTokensResponse:
            return control_pb2.RotateTokensResponse(operator_token=await self._controller.rotate_tokens())

        return await answered(context, work)


def new_lines(shown: list[str], now: list[str]) -> list[str]:
    """The lines of `now` that follow what was shown: both are the last lines of one growing text.

    What was shown last and `now` begins with is the longest prefix of `now` that `shown` ends with. It is found as
    Knuth, Morris and Pratt look for a word, in one pass over each: a crashing process says one line 100,000 times, and
    comparing every overlap would hold the control loop up.
    """
    if shown == now:
        return []
    borders = [0] * len(now)  # of each prefix of `now`: its longest proper prefix that it also ends with
    length = 0
    for place in range(1, len(now)):
        while length and now[place] != now[length]:
            length = borders[length - 1]
        length += now[place] == now[length]
        borders[place] = length
    overlap = 0
    for line in shown if now else ():
        while overlap and (overlap == len(now) or line != now[overlap]):
            overlap = borders[overlap - 1]
        overlap += line == now[overlap]
    return now[overlap:]


class MembershipServicer(membership_pb2_grpc.MembershipServicer):
    """Who serves, for routers and agents."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller
        self._watchers = 0

    async def Watch(
        self, request: membership_pb2.WatchRequest, context: Context
    ) -> AsyncIterator[membership_pb2.Snapshot]:
        if self._watchers >= WATCHERS_MAX:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{WATCHERS_MAX} watchers are connected")
        self._watchers += 1
        seen = (request.epoch, request.version)
        controller = self._controller
        try:
            while not controller.closed.is_set():
                current = await controller.publisher.newer_than(seen)
                seen = (current.epoch, current.version)
                yield current
        finally:
            self._watchers -= 1


class ThroughputServicer(throughput_pb2_grpc.ThroughputServicer):
    """Passes the agents' newest sample on, for those who reach only the controller."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller

    async def GetThroughput(
        self, request: throughput_pb2.GetThroughputRequest, context: Context
    ) -> throughput_pb2.ThroughputSample:
        return self._controller.links.sample

    async def WatchThroughput(
        self, request: throughput_pb2.GetThroughputRequest, context: Context
    ) -> AsyncIterator[throughput_pb2.ThroughputSample]:
        sent = None
        while not self._controller.closed.is_set():
            sample = self._controller.links.sample
            if sample is not sent:
                sent = sample
                yield sample
            await asyncio.sleep(0.2)


class ControlServer:
    """The server with its services. `attach` hooks let others add theirs before it starts."""

    def __init__(self, controller: Controller, tls: ServerTls | None) -> None:
        self._tls = tls
        options = [
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES + MAX_SPEC_BYTES),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),
            ("grpc.keepalive_permit_without_calls", 1),  # watchers are quiet for long and must notice a lost controller
            ("grpc.http2.min_ping_interval_without_data_ms", MIN_PING_MS),
        ]
        mutual = tls is not None and tls.client_ca_file is not None
        gate = Gate(Program.CONTROLLER, controller.credentials, certificates=mutual)
        self.server = grpc.aio.server(options=options, interceptors=[gate])
        control_pb2_grpc.add_ControlServicer_to_server(ControlServicer(controller), self.server)
        membership_pb2_grpc.add_MembershipServicer_to_server(MembershipServicer(controller), self.server)
        throughput_pb2_grpc.add_ThroughputServicer_to_server(ThroughputServicer(controller), self.server)
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.server)
        names = [
            control_pb2.DESCRIPTOR.services_by_name["Control"].full_name,
            membership_pb2.DESCRIPTOR.services_by_name["Membership"].full_name,
            throughput_pb2.DESCRIPTOR.services_by_name["Throughput"].full_name,
            throughput_pb2.DESCRIPTOR.services_by_name["ThroughputAttendance"].full_name,
            health.SERVICE_NAME,
        ]
        self._services = names
        reflection.enable_server_reflection([*names, reflection.SERVICE_NAME], self.server)

    async def start(self, host: str, port: int) -> int:
        """Binds and serves; returns the port. Raises RuntimeError when the port is taken."""
        bound = bind(self.server, f"{host}:{port}", self._tls)
        await self.server.start()
        for name in ("", *self._services):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        return bound

    async def stop(self) -> None:
        await self.server.stop(STOP_GRACE_S)
