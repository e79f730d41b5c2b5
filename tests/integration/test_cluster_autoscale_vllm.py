"""Real engines follow an open-loop load: 0 -> 1 -> 2 -> 1 -> 0 -> 1 replicas, and every request is answered."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatoken.router.client.client import TokenClient
from tests.support.clusters import RunningCluster, running

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

MODEL = "tiny"
TOKENS = 48
SPEC: dict[str, Any] = {
    "cluster": "elastic",
    "ray": {"cpu_devices": 2},
    "control": {"port": 0},
    "routers": {"port": 0},
    "edge": {"count": 0},
    "agents": {"enabled": False},
    "models": [
        {
            "name": MODEL,
            "source": "builtin:tiny-llama",
            "dtype": "float32",
            "replicas": 0,
            "autoscale": {"min_replicas": 0, "max_replicas": 2, "queue_s": 2, "scale_down_after_s": 6},
            "max_model_len": 256,
            "max_running": 2,
            "kv_cache_gib": 0.1,
            "cpu_threads": 1,
        }
    ],
}


class Load:
    """Requests at a rate, whether or not the ones before are done."""

    def __init__(self, client: TokenClient) -> None:
        self._client = client
        self.answers: list[asyncio.Task[list[int]]] = []

    def ask(self) -> asyncio.Task[list[int]]:
        stream = self._client.generate(MODEL, [1, 2, 3, 4], max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
        self.answers.append(asyncio.create_task(stream.tokens()))
        return self.answers[-1]

    async def until(self, rate: float, met: Callable[[], bool], timeout_s: float) -> None:
        """Asks at a rate until something is so."""
        looking: asyncio.Task[bool] = asyncio.create_task(asyncio.to_thread(met))
        async with asyncio.timeout(timeout_s):
            while True:
                await asyncio.sleep(1 / rate)
                self.ask()
                if looking.done():
                    if looking.result():
                        return
                    looking = asyncio.create_task(asyncio.to_thread(met))


def sizes(cluster: RunningCluster) -> tuple[int, int]:
    """Wanted and READY."""
    (model,) = cluster.status()["models"]
    return model["wanted"], model["ready"]


async def test_replicas_follow_the_load_down_to_none_and_no_request_fails(tmp_path: Path) -> None:
    with running(tmp_path, SPEC) as cluster:
        assert await asyncio.to_thread(sizes, cluster) == (0, 0)
        async with TokenClient([cluster.address("router")]) as client:
            load = Load(client)
            first = await asyncio.wait_for(load.ask(), 120)
            assert len(first) == TOKENS
            assert (await asyncio.to_thread(sizes, cluster))[1] == 1

            await load.until(8.0, lambda: sizes(cluster)[0] == 2, 60)
            await asyncio.to_thread(cluster.wait, lambda status: status["models"][0]["ready"] == 2, 60)
            said = await asyncio.to_thread(cluster.run, "explain", MODEL)
            assert "tiny: 2 wanted, 2 ready, between 0 and 2" in said
            async with asyncio.timeout(120):
                assert set(map(tuple, await asyncio.gather(*load.answers))) == {tuple(first)}

            await load.until(0.5, lambda: sizes(cluster) == (1, 1), 90)
            await asyncio.gather(*load.answers)
            await asyncio.to_thread(cluster.wait, lambda status: status["models"][0]["ready"] == 0, 60)
            assert await asyncio.wait_for(load.ask(), 120) == first
            events = await asyncio.to_thread(cluster.run, "events")
    for told in ("0 -> 1 replicas: somebody asks", "1 -> 2 replicas: ", "2 -> 1 replicas: ", "1 -> 0 replicas: nobody"):
        assert told in events, events
