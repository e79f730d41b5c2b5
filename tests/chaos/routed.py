"""A router over workers with the simulated engine, for campaigns: real processes, and streams that are judged."""

from __future__ import annotations

import asyncio
import os
import random
import re
import time
import urllib.request
from collections.abc import Callable
from typing import Any

from megatoken.router.client.client import TokenClient
from tests.chaos.outcome import Outcome
from tests.support.processes import Processes, Started

MODEL = "m"
PROMPT = list(range(10, 42))
TOKENS = 100  # of a judged stream


def seed() -> int:
    """MEGATOKEN_SEED, or another each time; a campaign names it with its problems."""
    return int(os.environ.get("MEGATOKEN_SEED") or random.randrange(1 << 30))


def start_worker(processes: Processes, name: str, simulated: dict[str, Any] | None = None, **config: Any) -> Started:
    engine = {"decode_tokens_per_s": 4000, "max_running": 64, "max_model_len": 4096, **(simulated or {})}
    settings = {"replica": name, "model": MODEL, "engine": "simulated", "simulated": engine}
    return processes.start("worker", {**settings, "counters_dir": str(processes.directory / "counters"), **config})


def start_router(processes: Processes, *workers: Started, **config: Any) -> Started:
    names = ("replica", "address", "max_model_len", "vocab_size", "max_running", "block_size", "engine")
    members = [
        {name: worker.ready[name] for name in names}
        | {"incarnation": str(worker.ready["incarnation"]), "model": MODEL, "phase": "REPLICA_PHASE_READY"}
        for worker in workers
    ]
    models = [{"model": MODEL, "replicas_wanted": len(workers)}]
    snapshot = {"epoch": "1", "version": "1", "replicas": members, "models": models}
    settings = {"router": "r", "static_snapshot": snapshot, "counters_dir": str(processes.directory / "counters")}
    return processes.start("router", {**settings, **config})


async def ready(client: TokenClient, replicas: int = 1) -> None:
    async with asyncio.timeout(60):
        while not any(model.ready_replicas >= replicas for model in await client.models()):  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def one(client: TokenClient, number: int = 0) -> list[int]:
    """A judged stream: the same number gives the same tokens, greedy, wherever and whenever it runs."""
    return await client.generate(MODEL, [*PROMPT, number], max_tokens=TOKENS, temperature=0.0).tokens()


class Streams:
    """So many streams one after the other, on one client, compared with what they were undisturbed."""

    def __init__(self, client: TokenClient, outcome: Outcome, count: int = 10) -> None:
        self.client, self.outcome, self.count = client, outcome, count
        self._expected: list[list[int]] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False

    async def __aenter__(self) -> Streams:
        self._expected = await asyncio.gather(*(one(self.client, number) for number in range(self.count)))
        self._tasks = [asyncio.create_task(self._run(number)) for number in range(self.count)]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stopping = True
        done, late = await asyncio.wait(self._tasks, timeout=30)
        for task in late:
            task.cancel()
        self.outcome.lost += len(late)
        if late:
            self.outcome.problem(f"{len(late)} streams never ended")
        await asyncio.gather(*done, return_exceptions=True)

    async def _run(self, number: int) -> None:
        while not self._stopping:
            self.outcome.requests += 1
            try:
                got = await one(self.client, number)
            except Exception as error:
                self.outcome.lost += 1
                self.outcome.problem(f"stream {number}: {type(error).__name__}: {error}"[:300])
                await asyncio.sleep(0.1)
                continue
            if got != self._expected[number]:
                self.outcome.wrong += 1
                self.outcome.problem(f"stream {number}: {len(got)} tokens, other than undisturbed")


def scrape(process: Started) -> str:
    with urllib.request.urlopen(f"http://{process.ready['metrics_address']}/metrics", timeout=20) as answer:
        return str(answer.read().decode())


def lag_counts(text: str, part: str) -> dict[float, float]:
    """Cumulative counts of the loop lag's histogram by upper bound, in seconds."""
    found = re.findall(rf'^megatoken_{part}_loop_lag_seconds_bucket{{.*?le="([^"]+)".*?}} (\S+)$', text, re.MULTILINE)
    return {float(bound): float(count) for bound, count in found}


def lag_ms(before: dict[float, float], after: dict[float, float], share: float = 0.999) -> float:
    """The upper bound of the bucket that the share falls in, between two scrapes; in ms."""
    counts = {bound: after[bound] - before.get(bound, 0.0) for bound in after}
    total = max(counts.values(), default=0.0)
    return next((1000 * bound for bound, count in sorted(counts.items()) if count >= share * total), 0.0)


def resident_bytes(process: Started) -> int:
    with open(f"/proc/{process.pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def forget_peak(process: Started) -> None:
    """The peak of its resident memory begins anew (proc(5), clear_refs)."""
    with open(f"/proc/{process.pid}/clear_refs", "w") as file:
        file.write("5")


def peak_bytes(process: Started) -> int:
    """The most memory that was resident since its start, or since forget_peak."""
    with open(f"/proc/{process.pid}/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("VmHWM:"))


async def settled(look: Callable[[], bool], within_s: float = 15.0) -> bool:
    """Whether `look` comes true in time."""
    until = time.monotonic() + within_s
    while not await asyncio.to_thread(look):
        if time.monotonic() > until:
            return False
        await asyncio.sleep(0.1)
    return True
