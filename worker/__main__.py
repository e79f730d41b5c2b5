"""One replica's process: `python -m megatoken.worker --config FILE [--ready-fd N]`.

Starts the engine, then the gRPC server and /metrics, writes its ready line, and serves until SIGTERM (drain, then
stop, status 0) or until the engine is gone (status 1, with the reason as its last words on stderr). A config that
cannot serve ends with status 2 and one line.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import megatoken.process.grpc_poller  # noqa: F401 - before what imports gRPC
from megatoken.errors import EngineDeadError, MegatokenError, RequestError
from megatoken.log import log_event, setup_logging
from megatoken.process.program import read_arguments, report_ready
from megatoken.process.start_phase import begin_phase, share_phases
from megatoken.process.tag import tag_process
from megatoken.process.uncollected import uncollected
from megatoken.worker.config import WorkerConfig
from megatoken.worker.engines.engine import Engine

if TYPE_CHECKING:
    from megatoken.worker.replica import RunningReplica

STATUS_ENGINE_DEAD: Final = 1
STATUS_BAD_CONFIG: Final = 2
FLUSH_S: Final = 1.0  # how long callers get to read their last Finish when the engine is gone

_log = logging.getLogger("worker")


async def serve(config: WorkerConfig, engine: Engine, ready_fd: int | None) -> int:
    """Serves a booted engine; returns the exit status."""
    from megatoken.process.loop_lag import watch_loop
    from megatoken.tracing import tracer_of
    from megatoken.worker.energy import meter_of
    from megatoken.worker.measures import WorkerMeasures
    from megatoken.worker.replica import RunningReplica
    from megatoken.worker.server import WorkerServer
    from megatoken.worker.totals import open_counters

    loop = asyncio.get_running_loop()
    stopping, died = asyncio.Event(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    counters = open_counters(config)
    replica = RunningReplica(config, engine, counters.totals, WorkerMeasures(), lambda _reason: died.set())
    starting = asyncio.create_task(replica.start())
    if not await _first(starting, stopping):
        starting.cancel()
        await engine.stop()
        return 0
    server = WorkerServer(config, replica)
    try:
        await starting
        address = await server.start()
        metrics_address, close_metrics = _start_metrics(config, replica)
    except BaseException:
        await engine.stop()
        raise
    replica.energy = meter_of(config)
    replica.tracer = tracer_of(config.tracing, "megatoken-worker", config.replica)
    facts = replica.facts
    log_event(_log, "replica.ready", address=address, engine=facts.engine, model=config.model)
    report_ready(
        ready_fd,
        address=address,
        metrics_address=metrics_address,
        replica=config.replica,
        incarnation=config.incarnation,
        engine=facts.engine,
        max_model_len=facts.max_model_len,
        vocab_size=facts.vocab_size,
        max_running=facts.max_running,
        block_size=facts.block_size,
        kv_cache_tokens=facts.kv_cache_tokens,
        weights=dict(facts.weights),
    )
    watching = asyncio.create_task(watch_loop(replica.measures.loop_lag_s))
    await _either(stopping, died)
    watching.cancel()
    await server.state_health(serving=False)
    if replica.dead is None:
        replica.drain()
        try:
            async with asyncio.timeout(config.stop_timeout_s):  # wait_for may lose a cancel
                await replica.drained.wait()
        except TimeoutError:
            replica.end_running()
    await server.stop(FLUSH_S)
    close_metrics()
    await engine.stop()
    if replica.tracer is not None:
        await asyncio.to_thread(replica.tracer.close)
    if replica.dead is not None:
        raise EngineDeadError(replica.dead)
    return 0


def _start_metrics(config: WorkerConfig, replica: RunningReplica) -> tuple[str | None, Callable[[], None]]:
    """Serves /metrics; returns its address, or None without one, and what closes it."""
    if config.metrics_port is None:
        return None, lambda: None
    from megatoken.metrics import serve_metrics
    from megatoken.worker.metrics import worker_registry

    try:
        registry, own = worker_registry(replica), replica.engine.exposition
        server = serve_metrics(registry, config.host, config.metrics_port, own)
    except OSError as error:
        raise RequestError("metrics_port", config.metrics_port, f"a port that is free; {error.strerror}") from None
    return f"{config.advertise_host or config.host}:{server.port}", server.close


async def _first(task: asyncio.Task[object], event: asyncio.Event) -> bool:
    """Waits for the task or the event; whether the task is done."""
    waiting = asyncio.create_task(event.wait())
    await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    return task.done()


async def _either(one: asyncio.Event, other: asyncio.Event) -> None:
    waiting = {asyncio.create_task(one.wait()), asyncio.create_task(other.wait())}
    _done, left = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    for task in left:
        task.cancel()


def main() -> int:
    """Entry point."""
    config, ready_fd = read_arguments("worker", WorkerConfig)
    tag_process(config.tag, "worker")
    share_phases(ready_fd)
    begin_phase("import")
    os.environ.update(config.env)
    if config.engine == "vllm":
        from megatoken.worker.engines.vllm.process import prepare_process

        prepare_process(config)
    setup_logging("worker", config.replica, config.log_level)
    with uncollected():
        import uvloop

        from megatoken.worker.engines.factory import make_engine

        engine = make_engine(config)
    try:
        engine.boot()
        return uvloop.run(serve(config, engine, ready_fd))
    except EngineDeadError as error:
        log_event(_log, "engine.dead", str(error), level=logging.ERROR, replica=config.replica)
        print(f"worker: {config.replica}: engine dead: {error}", file=sys.stderr, flush=True)
        return STATUS_ENGINE_DEAD
    except MegatokenError as error:
        print(f"worker: {config.replica}: {error}", file=sys.stderr, flush=True)
        return STATUS_BAD_CONFIG


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Straight out: threads of gRPC or of an engine that hangs must not keep a finished worker alive.
    os._exit(status)
