"""The worker's gRPC server: Tokens, Worker, health and reflection on one port."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from megatoken.access.files import CredentialsFile
from megatoken.access.gate import Gate
from megatoken.access.opening import credentials_of, gate_of
from megatoken.access.table import Identity, Program
from megatoken.errors import RequestError
from megatoken.tls import bind
from megatoken.v1 import tokens_pb2, worker_pb2, worker_pb2_grpc
from megatoken.worker.config import WorkerConfig
from megatoken.worker.fence import Fence
from megatoken.worker.leases import LeaseChecks, LeaseTable, UncheckedLeases
from megatoken.worker.replica import RunningReplica
from megatoken.worker.tokens_service import SERVICE as TOKENS
from megatoken.worker.tokens_service import tokens_handler
from megatoken.worker.worker_service import WorkerService

WORKER: Final = "megatoken.v1.Worker"
MAX_CONCURRENT_CALLS: Final = 100_000  # HTTP/2 streams of one connection; Generate takes one a request
KEEPALIVE_MS: Final = 20_000  # a dead peer is noticed within twice this


class WorkerServer:
    """The bound server of one replica. `start` binds and serves, `stop` ends every call.

    Raises RequestError for credentials that cannot be used, or that are missing where others reach the host.
    """

    def __init__(self, config: WorkerConfig, replica: RunningReplica) -> None:
        self._config = config
        self._replica = replica
        self._health: Any = vars(health)["aio"].HealthServicer()  # missing from the published stubs
        credentials = credentials_of(config.credentials_file)
        gate = gate_of(
            Program.WORKER,
            credentials,
            config.host,
            unguarded=config.unguarded,
            certificates=config.tls is not None and config.tls.mutual,
        )
        self._server = grpc.aio.server(options=_options(config), interceptors=[gate] if gate is not None else None)
        self._server.add_generic_rpc_handlers((tokens_handler(replica, _leases_of(config, gate, credentials)),))
        self._fence = Fence(replica, asyncio.get_running_loop())
        worker_pb2_grpc.add_WorkerServicer_to_server(WorkerService(replica, self._fence), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (
            tokens_pb2.DESCRIPTOR.services_by_name["Tokens"].full_name,
            worker_pb2.DESCRIPTOR.services_by_name["Worker"].full_name,
            health.SERVICE_NAME,
            reflection.SERVICE_NAME,
        )
        reflection.enable_server_reflection(names, self._server)

    async def start(self) -> str:
        """Binds and serves; returns the address others reach it by. Raises RequestError for a port in use."""
        config = self._config
        try:
            port = bind(self._server, f"{config.host}:{config.port}", config.tls)
        except OSError as error:
            raise RequestError("tls", error.filename, f"a file that can be read; {error.strerror}") from None
        except RuntimeError:
            raise RequestError("port", config.port, f"a port that is free on {config.host}, or 0 for any") from None
        await self._server.start()
        if config.lease_s is not None:
            self._fence.begin(config.lease_s)
        await self.state_health(serving=True)
        return f"{config.advertise_host or config.host}:{port}"

    async def state_health(self, serving: bool) -> None:
        """Sets the standard health of the whole server and of each service."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in ("", TOKENS, WORKER):
            await self._health.set(service, status)

    async def stop(self, grace_s: float) -> None:
        """Takes no further calls, and ends those that still run after `grace_s`."""
        self._fence.stop()
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)


def _leases_of(
    config: WorkerConfig, gate: Gate | None, credentials: CredentialsFile | None
) -> Callable[[Any], LeaseChecks | None]:
    """What each call's requests must show: nothing those of a router, a lease all others."""
    if gate is None or credentials is None:
        unchecked = UncheckedLeases()
        return lambda _context: unchecked
    book = LeaseTable(config.replica, config.incarnation, lambda: credentials.current)
    return lambda context: None if Identity.ROUTER in gate.identities(context) else book


def _options(config: WorkerConfig) -> list[tuple[str, Any]]:
    largest = config.max_message_mib * 2**20
    return [
        ("grpc.so_reuseport", 0),  # a second worker on the same port is a mistake, and is told
        ("grpc.max_receive_message_length", largest),
        ("grpc.max_send_message_length", largest),
        ("grpc.max_concurrent_streams", MAX_CONCURRENT_CALLS),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_MS),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
        ("grpc.keepalive_permit_without_calls", 1),
    ]
