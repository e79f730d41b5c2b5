"""What sampling costs serving, and how a reduction's cost grows with real gloo ranks."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import random
import signal
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np

from megatoken.counters import INDEX, read_counters
from megatoken.worker.throughput.decide.group import GroupPolicy
from megatoken.worker.throughput.decide.hierarchy import reduction_groups
from tests.support.processes import Started
from tests.support.throughput_chaos import Fleet
from tests.support.throughput_cluster import running

PHASE_S = 2.0
TICKS = 20
CELLS_A_RANK = 3  # a router's column, a model, a replica
PATIENT = GroupPolicy(silence_s=600.0)  # a frozen agent stays in its group: nothing but its absence is measured


async def overhead(directory: Path, pairs: int) -> dict[str, Any]:
    """Saturates a router and a simulated worker; the node's agent runs in one half of each pair of phases only.

    The order within a pair is random. The paired ratio is the plain measurement; the CPU share is steadier, since what
    a saturated machine gives the agent, serving loses.
    """
    async with running(directory, PATIENT, deadline_s=60.0) as agents:
        made = Fleet(agents, directory, decode_tokens_per_s=400_000, max_running=256)
        try:
            started = await agents.start("n0")
            await made.start_router("n0")
            await made.add("w0", "n0")
            await agents.until_ranks(("n0",))
            load = asyncio.create_task(made.traffic(128, 400))
            await asyncio.sleep(3.0)
            ratios, cpu_s, sampled_s, rate = await phases(agents.counters_dir("n0"), started, pairs)
            made.rest()
            await load
        finally:
            await made.close()
    ratios.sort()
    spread = sorted(float(np.median(random.Random(n).choices(ratios, k=len(ratios)))) for n in range(1000))
    return {
        "overhead_ratio": 1 - ratios[len(ratios) // 2],
        "overhead_ratio_ci95": [1 - spread[975], 1 - spread[25]],
        "overhead_pairs": pairs,
        "overhead_cpu_share": cpu_s / sampled_s / (os.cpu_count() or 1),
        "agent_cpu_ms_per_s": 1000 * cpu_s / sampled_s,
        "served_tokens_per_s": rate,
    }


async def phases(counters: Path, agent: Started, pairs: int) -> tuple[list[float], float, float, float]:
    """(served with / served without of each pair, CPU and wall seconds of the agent's phases, tokens/s)."""
    rng, ratios, cpu_s, wall_s, served = random.Random(1), [], 0.0, 0.0, 0.0
    for _ in range(pairs):
        rates = {}
        for sampling in rng.sample([True, False], 2):
            pids = agent.left()
            for pid in pids:
                os.kill(pid, signal.SIGCONT if sampling else signal.SIGSTOP)
            await asyncio.sleep(0.1)
            used, at, tokens = tree_cpu_s(pids), time.monotonic(), routed(counters)
            await asyncio.sleep(PHASE_S)
            seconds = time.monotonic() - at
            rates[sampling] = (routed(counters) - tokens) / seconds
            if sampling:
                cpu_s, wall_s = cpu_s + tree_cpu_s(pids) - used, wall_s + seconds
        for pid in agent.left():
            os.kill(pid, signal.SIGCONT)
        ratios.append(rates[True] / rates[False])
        served += rates[True] / pairs
    return ratios, cpu_s, wall_s, served


def routed(counters: Path) -> int:
    """Tokens in the router's ledger right now."""
    return read_counters(next(counters.glob("router-0.*.counters")))[1][INDEX["generated_tokens"]]


def tree_cpu_s(pids: list[int]) -> float:
    """CPU seconds of these processes, to the nanosecond: the scheduler's own account."""
    total = 0
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError):
                total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


async def scale(most: int) -> dict[str, Any]:
    """One reduction's cost with 2 .. `most` real ranks, flat and in two levels, and a model of it to 1,000."""
    lines = []
    size = 2
    while size <= most:
        lines.append(measure(size, ["all"] * size, "flat"))
        groups = reduction_groups([""] * size, False)
        if len(set(groups)) > 1:
            lines.append(measure(size, groups, "2 levels"))
        size *= 2
    return {"ranks": lines, "model": model(lines)}


def model(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Least squares of the CPU a rank and tick: a + b * ranks when flat, a + b * sqrt(ranks) in two levels."""
    fits = {}
    for levels, grows in (("flat", float), ("2 levels", math.sqrt)):
        chosen = [line for line in lines if line["levels"] == levels]
        if len(chosen) > 1:
            sizes = np.array([[1.0, grows(line["ranks"])] for line in chosen])
            (base, slope), *_ = np.linalg.lstsq(sizes, np.array([line["cpu_us"] for line in chosen]), rcond=None)
            fits[levels] = {
                "base_us": float(base),
                "slope_us": float(slope),
                "at_1000_us": base + slope * grows(1000.0),
            }
    text = "; ".join(
        f"{levels} {fit['base_us']:.0f} us + {fit['slope_us']:.0f} us x {'n' if levels == 'flat' else 'sqrt(n)'}"
        f" = {fit['at_1000_us'] / 1000:.1f} ms of CPU a rank and tick at 1,000 ranks"
        for levels, fit in fits.items()
    )
    bytes_1000 = 8 * (19 + 1000 * 8 * CELLS_A_RANK)
    return {"fits": fits, "bytes_at_1000": bytes_1000, "text": f"{text}; {bytes_1000 / 1000:.0f} kB vector"}


def measure(size: int, groups: list[str], levels: str) -> dict[str, Any]:
    """Forks `size` ranks of the shipped process group from one process that has imported torch."""
    import torch

    torch.set_num_threads(1)
    length = 19 + size * 8 * CELLS_A_RANK
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        reader, writer = os.pipe()
        pids = [fork_rank(rank, groups, length, listener, reader, writer) for rank in range(size)]
        os.close(writer)
        with os.fdopen(reader) as pipe:
            rows = [json.loads(line) for line in pipe]
        for pid in pids:
            os.waitpid(pid, 0)
    problems = [row for row in rows if "problem" in row]
    if problems or len(rows) < size:
        raise RuntimeError(f"{size} ranks, {levels}: {problems[:1] or 'a rank ended'}")
    return {
        "ranks": size,
        "levels": levels,
        "groups": len(set(groups)),
        "bytes": 8 * length,
        "form_s": max(row["form_s"] for row in rows),
        "wall_ms_p50": 1000 * max(row["wall_s"] for row in rows),
        "cpu_us": 1e6 * sum(row["cpu_s"] for row in rows) / size,
    }


def fork_rank(rank: int, groups: list[str], length: int, listener: socket.socket, reader: int, writer: int) -> int:
    """One rank in a child, which writes a line of JSON and ends."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.close(reader)
        row = run_rank(rank, groups, length, listener)
    except BaseException as error:
        row = {"problem": f"rank {rank}: {error}"}
    os.write(writer, json.dumps(row).encode() + b"\n")
    os._exit(0)


def run_rank(rank: int, groups: list[str], length: int, listener: socket.socket) -> dict[str, float]:
    """Connects, reduces TICKS times, and stays until every rank is done."""
    from megatoken.worker.throughput.reduce.process_group import ProcessGroup

    facts = {"epoch": 1, "rank": rank, "groups": groups, "backend": "gloo", "device": 0, "interface": None}
    facts |= {"store": listener.getsockname(), "host": "127.0.0.1", "timeout_s": 60.0}
    began = time.perf_counter()
    group = ProcessGroup(facts, listener.fileno())
    vector = np.ones(length, np.int64)
    group.all_reduce(vector, 60.0)
    formed, used, took = time.perf_counter() - began, time.process_time(), []
    for _ in range(TICKS):
        at = time.perf_counter()
        group.all_reduce(vector, 60.0)
        took.append(time.perf_counter() - at)
    row = {"form_s": formed, "wall_s": sorted(took)[TICKS // 2], "cpu_s": (time.process_time() - used) / TICKS}
    group.all_reduce(vector, 60.0)
    return row
