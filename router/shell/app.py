"""RouterApp: puts core and shells together, serves until told to stop, drains, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import random
import time
from collections.abc import Awaitable, Callable

from google.protobuf import json_format
from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from megatoken.access.channel import presenting
from megatoken.access.files import CredentialsFile
from megatoken.access.opening import credentials_of, gate_of
from megatoken.access.table import Program
from megatoken.counters import CounterWriter
from megatoken.process.loop_lag import watch_loop
from megatoken.process.supervise import FaultLog, Faults, every
from megatoken.router.config import RouterConfig
from megatoken.router.core import recovery, upkeep
from megatoken.router.core.state import RouterState
from megatoken.router.fleet.fleet import Endpoint, EndpointTable
from megatoken.router.identity.api_keys import KeyRing
from megatoken.router.identity.callers import CallerRegistry
from megatoken.router.secure import channel_to
from megatoken.router.shell.health import RouterHealth
from megatoken.router.shell.inbox import Inbox
from megatoken.router.shell.leases import IssuedLeases, LeaseSigner
from megatoken.router.shell.membership import apply_snapshot
from megatoken.router.shell.metrics import LeaseCollector, loop_lag, serve_metrics
from megatoken.router.shell.request_log import log_request
from megatoken.router.shell.request_spans import RequestSpans
from megatoken.router.shell.service import RouterService, tokens_handler
from megatoken.router.shell.throughput import ClusterCollector, ThroughputRelay
from megatoken.router.shell.watch import watch_membership
from megatoken.router.shell.worker_link import WorkerLink
from megatoken.router.streams.ledger import RouterLedger
from megatoken.tls import bind
from megatoken.tracing import tracer_of
from megatoken.v1 import membership_pb2, router_pb2, router_pb2_grpc, throughput_pb2, throughput_pb2_grpc, tokens_pb2

log = logging.getLogger(__name__)

FIRST_SNAPSHOT_S = 5.0  # a controller that is away may not keep a router away for long
TICK_S = 0.1
SLOW_TICK_S = 1.0
HOLD_TICK_S = 0.005
SERVICES = ("megatoken.v1.Tokens", "megatoken.v1.Router")


class RouterApp:
    """`start`, then `stop`. Addresses are known after start."""

    def __init__(self, config: RouterConfig, incarnation: int) -> None:
        self.config = config
        writer = None
        if config.counters_dir is not None:
            header = {"kind": "router", "id": config.router, "incarnation": incarnation, "model": "", "engine": ""}
            header |= {"device_kind": "", "devices": 0, "node": config.node, "site": config.site}
            writer = CounterWriter(config.counters_dir / f"{config.router}.{incarnation}.counters", header)
        self.writer = writer
        self.state = RouterState(
            config, RouterLedger(writer), random.Random(incarnation), EndpointTable(config.admission, config.breaker)
        )
        self.keys = KeyRing(config.api_keys_file) if config.api_keys_file is not None else None
        self.state.callers = CallerRegistry(self.keys)
        self.state.faults = Faults(FaultLog())
        self._credentials = credentials_of(config.credentials_file)
        self.leases = IssuedLeases(self.state, _signer(self._credentials))
        self.state.on_lease_usage = self.leases.report
        self._gate = gate_of(
            Program.ROUTER,
            self._credentials,
            config.host,
            unguarded=config.unguarded,
            certificates=config.tls is not None and config.tls.client_ca_file is not None,
            is_client=self.state.callers.identify,
        )
        # Where there is a gate it has asked for the key already, and let in those who need none.
        self._ask_key = self.state.callers.identify if self._gate is None else lambda _metadata: None
        self.throughput = ThroughputRelay(self._ask_key)
        if config.request_log:
            self.state.on_finished.append(log_request)
        self._tracer = tracer_of(config.tracing, "megatoken-router", config.router)
        if self._tracer is not None:
            RequestSpans(self._tracer, self.state)
        self._lag_s = loop_lag()
        self._inbox = Inbox(self.state)
        self.address = ""
        self.own_address = ""  # where this router alone answers, when others share its address
        self.metrics_address = ""
        self._links: dict[Endpoint, WorkerLink] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._closing: set[asyncio.Task[None]] = set()
        self._health = RouterHealth(self.state, self._channel)
        self._server: aio.Server | None = None
        self._told = asyncio.Event()  # a first snapshot came
        self._held = asyncio.Event()  # a request came whose tokens may be held
        self.state.on_held = self._held.set
        self._stop_metrics = lambda: None

    async def start(self) -> None:
        config = self.config
        options = server_options(config)
        interceptors = [self._gate] if self._gate is not None else None
        server = aio.server(options=options, interceptors=interceptors, maximum_concurrent_rpcs=None)
        server.add_generic_rpc_handlers((tokens_handler(self.state, config),))
        router_pb2_grpc.add_RouterServicer_to_server(RouterService(self.state, self.leases, self._ask_key), server)
        throughput_pb2_grpc.add_ThroughputServicer_to_server(self.throughput, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (
            tokens_pb2.DESCRIPTOR.services_by_name["Tokens"].full_name,
            router_pb2.DESCRIPTOR.services_by_name["Router"].full_name,
            throughput_pb2.DESCRIPTOR.services_by_name["Throughput"].full_name,
            health.SERVICE_NAME,
            reflection.SERVICE_NAME,
        )
        reflection.enable_server_reflection(names, server)
        try:
            port = bind(server, f"{config.host}:{config.port}", config.tls)
            if config.own_port is not None:
                own_port = bind(server, f"{config.host}:{config.own_port}", config.tls)
                self.own_address = f"{config.advertise_host or config.host}:{own_port}"
        except RuntimeError as error:
            raise OSError(f"port: one on {config.host} is taken ({error}); a free one, or 0 for any") from None
        if config.static_snapshot is not None:
            self.apply(json_format.ParseDict(config.static_snapshot, membership_pb2.Snapshot()))
        if config.controllers:
            self.state.fleet.told = config.static_snapshot is not None
            watching = watch_membership(config.controllers, config.router, self._channel, self.apply, self._connected)
            self._tasks.append(asyncio.create_task(watching))
            # Whoever comes before we know of any replica would be told that no model is served.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._told.wait(), FIRST_SNAPSHOT_S)
        await server.start()
        self._server = server
        self.address = f"{config.advertise_host or config.host}:{port}"
        if config.metrics_port is not None:
            self.metrics_address, self._stop_metrics = serve_metrics(
                self.state, ClusterCollector(self.throughput), LeaseCollector(self.leases), self._lag_s
            )
        await self._set_serving(True)
        if config.throughput_agent is not None:
            following = self.throughput.follow(config.throughput_agent, self._channel)
            self._tasks.append(asyncio.create_task(following))
        self._tasks.append(asyncio.create_task(watch_loop(self._lag_s[()])))
        self._keep_up(TICK_S, self._tick, "upkeep")
        self._keep_up(SLOW_TICK_S, self._slow_tick, "slow upkeep")
        self._keep_up(SLOW_TICK_S, self._expire_leases, "leases")
        self._keep_up(HOLD_TICK_S, self._hold_tick, "held delivery")
        if self.keys is not None:
            self._keep_up(SLOW_TICK_S, self.keys.refresh, "keys")
        gc.collect()
        gc.freeze()
        gc.set_threshold(50_000, 20, 50)

    def _channel(self, address: str) -> aio.Channel:
        present = self._credentials.metadata if self._credentials is not None else None
        return presenting(channel_to(address, self.config.worker_tls), present)

    def _connected(self, up: bool) -> None:
        self.state.membership_connected = up

    def apply(self, snapshot: membership_pb2.Snapshot) -> None:
        now = time.monotonic()
        self._told.set()
        change = apply_snapshot(self.state.fleet, snapshot, self.state.policy_of, now)
        if change is None:
            return
        for problem in change.problems:
            log.error("%s", problem)
        for replica in change.added:
            link = WorkerLink(self.state, self._inbox, replica, self._channel)
            self._links[replica] = link
            link.start()
        for replica in change.removed:
            closing = asyncio.create_task(self._retire(replica))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    async def _retire(self, replica: Endpoint) -> None:
        """A replica that is no longer a member: what it still has moves, then its session ends."""
        link = self._links.pop(replica, None)
        if link is not None:
            await link.close()
        if replica in self.state.fleet.live():  # it was not connected: nothing else lets go of its place
            recovery.lose_replica(self.state, replica, f"replica {replica.name} was removed", time.monotonic())

    def _tick(self) -> None:
        upkeep.tick(self.state, time.monotonic(), time.time())

    def _slow_tick(self) -> None:
        upkeep.slow_tick(self.state, time.monotonic())

    def _expire_leases(self) -> None:
        self.leases.expire(time.monotonic())

    async def _hold_tick(self) -> None:
        if not (self.state.holds or self.state.held):
            self._held.clear()
            await self._held.wait()
        upkeep.flush_due(self.state, time.monotonic())

    def _keep_up(self, period_s: float, step: Callable[[], Awaitable[None] | None], name: str) -> None:
        """Goes on until `stop`, whatever comes."""
        self._tasks.append(asyncio.create_task(every(period_s, step, name, self.state.faults.caught), name=name))

    async def _set_serving(self, serving: bool) -> None:
        kind = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", "ready", *SERVICES):
            await self._health.set(name, kind)
        await self._health.set("live", health_pb2.HealthCheckResponse.SERVING)

    async def stop(self) -> None:
        """Takes no new calls, lets running requests end for drain_s, then ends the rest."""
        self.state.draining = True
        await self._set_serving(False)
        for sink in self.state.sinks:
            if sink is not None:
                sink.wake()  # a session that is idle ends now, others when their requests have
        if self._server is not None:
            await self._server.stop(self.config.drain_s if self.state.live else 0.2)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, *self._closing, return_exceptions=True)
        await asyncio.gather(*(link.close() for link in self._links.values()))
        self._stop_metrics()
        if self.writer is not None:
            self.writer.close()
        if self._tracer is not None:
            await asyncio.to_thread(self._tracer.close)


def _signer(credentials: CredentialsFile | None) -> LeaseSigner | None:
    return LeaseSigner(lambda: credentials.current) if credentials is not None else None


def server_options(config: RouterConfig) -> list[tuple[str, int]]:
    limits = config.limits
    return [
        ("grpc.so_reuseport", int(config.reuse_port)),
        ("grpc.max_receive_message_length", limits.max_message_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_concurrent_streams", limits.max_connections_streams),
        ("grpc.max_metadata_size", limits.max_header_bytes),
        ("grpc.absolute_max_metadata_size", 2 * limits.max_header_bytes),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
        ("grpc.http2.max_ping_strikes", 0),
    ]
