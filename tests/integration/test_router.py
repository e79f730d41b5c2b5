"""Routers and workers as real processes, the simulated engine behind them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatoken.errors import MegatokenError, RequestError
from router.client import TokenClient
from tests.processes import Processes, Started

MODEL = "simulated"
PROMPT = list(range(10, 42))


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    with Processes(tmp_path) as started:
        yield started


def start_worker(processes: Processes, name: str, **simulated: Any) -> Started:
    settings = {"decode_tokens_per_s": 20_000, "max_running": 64, "max_model_len": 4096, **simulated}
    config = {
        "replica": name,
        "model": MODEL,
        "engine": "simulated",
        "counters_dir": str(processes.directory / "counters"),
        "metrics_port": None,
        "simulated": settings,
    }
    return processes.start("worker", config)


def member(worker: Started) -> dict[str, Any]:
    ready = worker.ready
    return {
        "replica": ready["replica"],
        "model": MODEL,
        "address": ready["address"],
        "incarnation": str(ready["incarnation"]),
        "phase": "REPLICA_PHASE_READY",
        "max_model_len": ready["max_model_len"],
        "vocab_size": ready["vocab_size"],
        "max_running": ready["max_running"],
        "block_size": ready["block_size"],
        "engine": ready["engine"],
    }


def snapshot(*workers: Started) -> dict[str, Any]:
    return {
        "epoch": "1",
        "version": "1",
        "replicas": [member(worker) for worker in workers],
        "models": [{"model": MODEL, "replicas_wanted": len(workers)}],
    }


def start_router(processes: Processes, *workers: Started, **settings: Any) -> Started:
    config = {
        "router": f"r{len(processes.started)}",
        "static_snapshot": snapshot(*workers),
        "counters_dir": str(processes.directory / "counters"),
        **settings,
    }
    return processes.start("router", config)


async def ready(client: TokenClient, replicas: int) -> None:
    """Until the router has sessions to so many replicas."""
    async with asyncio.timeout(20):
        while not any(model.ready_replicas >= replicas for model in await client.models()):  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_tokens_stream_through_router_and_worker(processes: Processes) -> None:
    worker = start_worker(processes, "w0")
    router = start_router(processes, worker)
    async with TokenClient([router.address]) as client:
        await ready(client, 1)
        stream = client.generate(MODEL, PROMPT, max_tokens=20, temperature=0.0)
        tokens = await stream.tokens()
        assert len(tokens) == 20
        assert stream.finish is not None
        assert (stream.finish.prompt_tokens, stream.finish.generated_tokens) == (32, 20)
        assert stream.finish.replica == "w0"
        streams = [client.generate(MODEL, PROMPT, max_tokens=50, temperature=0.0) for _ in range(100)]
        answers = await asyncio.gather(*(s.tokens() for s in streams))
        assert all(answer[:20] == tokens and len(answer) == 50 for answer in answers)


@pytest.mark.parametrize(
    ("model", "prompt", "fields", "complaint"),
    [
        ("nobody", PROMPT, {}, "model: 'nobody' is not allowed; one of: simulated"),
        (MODEL, [], {}, "prompt: "),
        (MODEL, [1 << 20], {}, "vocabulary"),
        (MODEL, PROMPT, {"max_tokens": 5000}, "max_tokens: 5000"),
        (MODEL, PROMPT, {"temperature": -1.0}, "temperature: -1.0"),
    ],
)
async def test_a_wrong_request_is_told_what_is_wrong(
    processes: Processes, model: str, prompt: list[int], fields: dict[str, Any], complaint: str
) -> None:
    worker = start_worker(processes, "w0")
    router = start_router(processes, worker)
    async with TokenClient([router.address]) as client:
        await ready(client, 1)
        with pytest.raises(RequestError) as caught:
            await client.generate(model, prompt, **fields).tokens()
        assert complaint in str(caught.value)


async def test_kill_9_of_a_worker_is_not_seen_by_any_stream(processes: Processes) -> None:
    workers = [start_worker(processes, f"w{i}", decode_tokens_per_s=6400) for i in range(2)]
    router = start_router(processes, *workers)
    async with TokenClient([router.address]) as client:
        await ready(client, 2)

        async def run() -> list[list[int]]:
            streams = [client.generate(MODEL, [*PROMPT, i], max_tokens=200, temperature=0.0) for i in range(64)]
            return await asyncio.gather(*(stream.tokens() for stream in streams))

        undisturbed = await run()
        disturbed = asyncio.create_task(run())
        await asyncio.sleep(0.5)
        workers[0].kill()
        assert await disturbed == undisturbed


async def test_cancelling_a_stream_frees_it_everywhere(processes: Processes) -> None:
    worker = start_worker(processes, "w0", decode_tokens_per_s=640)
    router = start_router(processes, worker)
    async with TokenClient([router.address]) as client:
        await ready(client, 1)
        stream = client.generate(MODEL, PROMPT, max_tokens=4000, temperature=0.0)
        async for _ in stream:
            break
        other = client.generate(MODEL, PROMPT, max_tokens=3, temperature=0.0)
        assert len(await other.tokens()) == 3
        with pytest.raises(MegatokenError):
            await client.generate("nobody", PROMPT).tokens()
