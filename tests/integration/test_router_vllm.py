"""kill -9 of one of two real vLLM replicas under 32 greedy streams, in float32: every stream is the undisturbed one."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator

import pytest

from megatoken.router.client.client import TokenClient, TokenStream
from megatoken.v1 import tokens_pb2
from tests.support.processes import Processes, Started

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

SOURCE = "builtin:smollm2-135m-instruct"
STREAMS, TOKENS = 32, 20


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    with Processes(tmp_path_factory.mktemp("router_vllm")) as started:
        yield started


def start_worker(processes: Processes, name: str) -> Started:
    return processes.start(
        "worker",
        {
            "replica": name,
            "model": "smollm2",
            "source": SOURCE,
            "dtype": "float32",
            "max_model_len": 256,
            "max_running": STREAMS,
            "kv_cache_gib": 0.5,
            "cpu_threads": 1,
            "metrics_port": None,
            "counters_dir": str(processes.directory / "counters"),
        },
        timeout_s=400,
    )


async def start_both(processes: Processes) -> list[Started]:
    """At the same time: most of a start is imports."""
    return list(await asyncio.gather(*(asyncio.to_thread(start_worker, processes, f"v{i}") for i in range(2))))


async def test_kill_9_of_a_real_replica_breaks_no_stream(processes: Processes) -> None:
    workers = await start_both(processes)
    members = [
        {
            "replica": worker.ready["replica"],
            "model": "smollm2",
            "address": worker.address,
            "incarnation": str(worker.ready["incarnation"]),
            "phase": "REPLICA_PHASE_READY",
            "max_model_len": 256,
            "max_running": STREAMS,
        }
        for worker in workers
    ]
    snapshot = {"epoch": 1, "version": 1, "replicas": members, "models": [{"model": "smollm2"}]}
    router = processes.start(
        "router", {"router": "r", "static_snapshot": snapshot, "metrics_port": None, "resume": {"hang_s": 120.0}}
    )
    rng = random.Random(11)
    prompts = [[rng.randrange(100, 40_000) for _ in range(rng.randrange(8, 24))] for _ in range(STREAMS)]
    async with TokenClient([router.address]) as client:
        async with asyncio.timeout(60):
            while [model.ready_replicas for model in await client.models()] != [2]:  # noqa: ASYNC110
                await asyncio.sleep(0.05)

        def start_all() -> list[TokenStream]:
            return [
                client.generate("smollm2", prompt, max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
                for prompt in prompts
            ]

        undisturbed = await asyncio.gather(*(stream.tokens() for stream in start_all()))
        disturbed = start_all()
        answers = [asyncio.create_task(stream.tokens()) for stream in disturbed]
        async with asyncio.timeout(300):
            while sum(stream.moved for stream in disturbed) < STREAMS:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        workers[0].kill()
        assert await asyncio.gather(*answers) == undisturbed
        moved = [stream for stream in disturbed if stream.finish and stream.finish.resumes]
        assert moved
        assert {stream.finish.replica for stream in moved if stream.finish} == {"v1"}
        assert {stream.finish.resume_note for stream in moved if stream.finish} == {""}
        reasons = {stream.finish.reason for stream in disturbed if stream.finish}
        assert reasons == {tokens_pb2.FINISH_REASON_LENGTH}
    workers[0].check_nothing_left(30)
