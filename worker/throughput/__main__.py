"""`python -m megatoken.worker.throughput --config FILE --ready-fd N`: one agent, until SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from megatoken.access.opening import credentials_of, gate_of
from megatoken.access.table import Program
from megatoken.errors import RequestError
from megatoken.log import setup_logging
from megatoken.metrics import serve_metrics
from megatoken.process.program import read_arguments, report_ready
from megatoken.tls import bind
from megatoken.v1 import throughput_pb2_grpc
from megatoken.worker.throughput.agent import Agent
from megatoken.worker.throughput.config import AgentConfig
from megatoken.worker.throughput.metrics import AgentCollector, AgentMetrics
from megatoken.worker.throughput.reduce.client import ForkServer, ReduceFailure, choose_backends

STORE_BACKLOG = 1024  # every rank of a forming group may knock before the store serves
PROGRAM = "megatoken.worker.throughput"


def main() -> None:
    """Entry point."""
    config, ready_fd = read_arguments(f"python -m {PROGRAM}", AgentConfig)
    setup_logging("agent", config.agent, config.log_level)
    try:
        asyncio.run(serve(config, ready_fd))
    except (OSError, ValueError, RequestError, ReduceFailure) as error:
        print(f"python -m {PROGRAM}: {error}", file=sys.stderr)
        raise SystemExit(1) from None


async def serve(config: AgentConfig, ready_fd: int | None) -> None:
    """Runs one agent until SIGTERM or SIGINT."""
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    listener = listen(config)
    forkserver = ForkServer(listener)
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(listener.close)
        await forkserver.start()
        stack.push_async_callback(forkserver.stop)
        backends = choose_backends(config.backend, forkserver.backends)
        credentials = credentials_of(config.credentials_file)
        mutual = config.tls is not None and config.tls.client_ca_file is not None
        gate = gate_of(Program.AGENT, credentials, config.host, unguarded=config.unguarded, certificates=mutual)
        interceptors = [gate] if gate is not None else None
        server = grpc.aio.server(options=(("grpc.so_reuseport", 0),), interceptors=interceptors)
        port = bind_server(server, config)
        host = url_host(config.reachable_host)
        store_address = f"{host}:{listener.getsockname()[1]}"
        metrics = AgentMetrics()
        present = credentials.metadata if credentials is not None else None
        agent = Agent(config, forkserver, backends, f"{host}:{port}", store_address, metrics, present)
        metrics.registry.register(AgentCollector(agent.rows, agent.throughput_state))
        metrics_address = None
        if config.metrics_port is not None:
            exporter = serve_metrics(metrics.registry, config.host, config.metrics_port)
            stack.callback(exporter.close)
            metrics_address = f"{host}:{exporter.port}"
        throughput_pb2_grpc.add_ThroughputServicer_to_server(agent.samples, server)
        checks = health.aio.HealthServicer()  # type: ignore[attr-defined]
        await checks.set("", health_pb2.HealthCheckResponse.SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(checks, server)
        await server.start()
        stack.push_async_callback(server.stop, 0.2)
        running = asyncio.create_task(agent.run())
        report_ready(
            ready_fd,
            address=f"{host}:{port}",
            store_address=store_address,
            metrics_address=metrics_address,
            agent=config.agent,
            node=config.node,
            backends=list(backends),
            pid=os.getpid(),
        )
        waiting = asyncio.create_task(stopped.wait())
        await asyncio.wait((running, waiting), return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if running.done():
            running.result()  # raises what ended it
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def listen(config: AgentConfig) -> socket.socket:
    """Reserves the store's port for the agent's life. Raises OSError that names the port."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.store_port))
        listener.listen(STORE_BACKLOG)
    except OSError as error:
        listener.close()
        raise OSError(f"store_port: {config.store_port} on {config.host} cannot be used: {error.strerror}") from None
    return listener


def bind_server(server: grpc.aio.Server, config: AgentConfig) -> int:
    """Binds the Throughput service. Raises OSError that names the port."""
    try:
        return bind(server, f"{url_host(config.host)}:{config.port}", config.tls)
    except RuntimeError:
        raise OSError(f"port: {config.port} on {config.host} cannot be used; it is taken or not this host's") from None


def url_host(host: str) -> str:
    """A host as it stands before a port: IPv6 in brackets."""
    return f"[{host}]" if ":" in host else host


if __name__ == "__main__":
    main()
