"""`python -m megatoken.router --config FILE [--ready-fd N]`: one router process, until SIGTERM or SIGINT."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time

import uvloop

import megatoken.process.grpc_poller  # noqa: F401 - before what imports gRPC
from megatoken.log import setup_logging
from megatoken.process.program import read_arguments, report_ready
from megatoken.router.config import RouterConfig
from megatoken.router.shell.app import RouterApp


async def _main(config: RouterConfig, ready_fd: int | None) -> None:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    app = RouterApp(config, time.time_ns())
    await app.start()
    report_ready(
        ready_fd,
        address=app.address,
        own_address=app.own_address,
        metrics_address=app.metrics_address,
        router=config.router,
    )
    await stopping.wait()
    await app.stop()


def main() -> None:
    config, ready_fd = read_arguments("router", RouterConfig)
    setup_logging("router", config.router, config.log_level)
    try:
        uvloop.run(_main(config, ready_fd))
    except (OSError, ValueError) as error:
        print(f"router: {error}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(1)


if __name__ == "__main__":
    main()
