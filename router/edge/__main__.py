"""`python -m megatoken.router.edge --config FILE [--ready-fd N]`: one edge process.

vLLM's imports take most of the start, so what can be checked without them is checked before: the config, the port, the
keys file, where the models are. It listens only when it serves: an edge that still starts gets no connection of a
shared port.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import ssl
import sys
import time
from typing import Any

import megatoken.process.grpc_poller  # noqa: F401 - before what imports gRPC
from megatoken.errors import MegatokenError, RequestError
from megatoken.log import setup_logging
from megatoken.process.program import read_arguments, report_ready
from megatoken.process.uncollected import uncollected
from megatoken.router.edge.config import EdgeConfig
from megatoken.router.edge.vllm.serve_args import serve_arguments
from megatoken.router.identity.api_keys import KeyRing
from megatoken.tls import CertificateFiles, ServerTls

BACKLOG = 2048
CERTIFICATES_S = 1.0  # exchanged certificates are in force within this


def bind(config: EdgeConfig) -> socket.socket:
    """The bound socket. Raises RequestError when the port cannot be had."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if config.reuse_port:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind((config.host, config.port))
    except OSError as error:
        listener.close()
        raise RequestError("port", config.port, f"a free port of {config.host}: {error.strerror}") from None
    listener.setblocking(False)
    return listener


def prepare_environment(config: EdgeConfig) -> None:
    """What vLLM reads from the environment at import."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ["VLLM_LOGGING_LEVEL"] = config.log_level.upper()
    os.environ["VLLM_CONFIGURE_LOGGING"] = "0"  # our own JSON lines
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # no tensor work here


def stop_at_once(*_: object) -> None:
    """SIGTERM before the server takes it over, and again when the server has drained."""
    raise SystemExit(0)


async def serve(config: EdgeConfig, keys: KeyRing | None, listener: socket.socket, ready_fd: int | None) -> None:
    """Serves until SIGTERM or SIGINT, then lets running requests end for `limits.drain_s`."""
    with uncollected():
        import uvicorn

        from megatoken.router.edge.assemble import assemble

    parts = await assemble(config, keys)

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            gc.collect()
            gc.freeze()  # what start-up left never becomes garbage: keep it out of collections
            host, port = listener.getsockname()[:2]
            facts = {"address": f"{config.advertise_host or host}:{port}", "edge": config.edge}
            if parts.metrics is not None:
                metrics_host = config.advertise_host or config.metrics_host
                facts["metrics_address"] = f"{metrics_host}:{parts.metrics.port}"
            report_ready(ready_fd, **facts)

    options: dict[str, Any] = {}
    if config.tls is not None:
        options = {
            "ssl_certfile": str(config.tls.cert_file),
            "ssl_keyfile": str(config.tls.key_file),
            "ssl_ca_certs": str(config.tls.client_ca_file) if config.tls.client_ca_file else None,
            "ssl_cert_reqs": ssl.CERT_REQUIRED if config.tls.client_ca_file else ssl.CERT_NONE,
        }
    settings = uvicorn.Config(
        parts.app,
        http="httptools",
        loop="none",
        lifespan="off",
        ws="none",
        log_config=None,
        access_log=config.access_log,
        log_level=config.log_level,
        server_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=int(config.limits.keep_alive_s),
        timeout_graceful_shutdown=max(1, round(config.limits.drain_s)),
        **options,
    )
    settings.load()
    renewing = asyncio.create_task(renew_certificates(config.tls, settings.ssl))
    try:
        await Server(settings).serve(sockets=[listener])
    finally:
        renewing.cancel()
        await parts.close()


async def renew_certificates(tls: ServerTls | None, context: ssl.SSLContext | None) -> None:
    """Has new connections see exchanged certificates; until cancelled."""
    if tls is None or context is None:
        return
    files = CertificateFiles(tls)
    while True:
        await asyncio.sleep(CERTIFICATES_S)
        if files.changed():
            with contextlib.suppress(OSError, ssl.SSLError):  # gone since that look; changed again soon
                files.load_into(context)


def main() -> int:
    began = time.monotonic()
    config, ready_fd = read_arguments("python -m megatoken.router.edge", EdgeConfig)
    setup_logging("edge", config.edge, config.log_level)
    signal.signal(signal.SIGTERM, stop_at_once)
    try:
        keys = KeyRing(config.api_keys_file) if config.api_keys_file is not None else None
        for model in config.models:
            serve_arguments(model)
        listener = bind(config)
    except (MegatokenError, OSError, ValueError) as error:
        print(f"python -m megatoken.router.edge: {error}", file=sys.stderr)
        return 2
    prepare_environment(config)
    import uvloop

    with contextlib.closing(listener):
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(serve(config, keys, listener, ready_fd))
        except (MegatokenError, OSError, ValueError) as error:  # what vLLM says about a model
            print(f"python -m megatoken.router.edge: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            pass
    logging.getLogger(__name__).info("served for %.0f s", time.monotonic() - began)
    return 0


if __name__ == "__main__":
    sys.exit(main())
