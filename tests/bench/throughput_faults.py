"""Recovery from kill -9 of agents, what 1,000 epoch changes leave behind, and the three counts after chaos."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

from megatoken.v1 import membership_pb2
from tests.throughput_chaos import fleet, graceful_chaos, violent_chaos
from tests.throughput_cluster import Agents, running

NODES = ("n0", "n1", "n2", "n3")


async def recovery(directory: Path, kills: int) -> dict[str, Any]:
    """Kills one of four agents at a time, each at another moment of the tick; the others must sum again."""
    seconds: list[float] = []
    incomplete: list[int] = []
    async with running(directory) as agents:
        await agents.start_all(NODES)
        for number in range(kills):
            await agents.until_ranks(NODES, 60)
            victim = NODES[number % len(NODES)]
            survivors = [node for node in NODES if node != victim]
            watching = [asyncio.create_task(recovered(agents, node)) for node in survivors]
            await asyncio.sleep(0.1 + (number % 10) / 10)
            killed = time.monotonic()
            await agents.kill(victim)
            ends = await asyncio.gather(*watching)
            seconds.append(max(end for end, _ in ends) - killed)
            incomplete.append(max(missed for _, missed in ends))
            await agents.start(victim)
    seconds.sort()
    p99 = seconds[min(len(seconds) - 1, int(len(seconds) * 0.99))]
    return {
        "kills": kills,
        "recovery_s_p50": seconds[len(seconds) // 2],
        "recovery_s_p99": p99,
        "recovery_s_max": seconds[-1],
        "incomplete_samples_max": max(incomplete),
    }


async def recovered(agents: Agents, node: str) -> tuple[float, int]:
    """(when the first complete sample of a later epoch came, incomplete ones before it)."""
    before, incomplete = (await agents.sample(node)).epoch, 0
    async with asyncio.timeout(60):
        async for sample in agents.watch(node):
            if sample.complete and sample.epoch > before:
                return time.monotonic(), incomplete
            incomplete += not sample.complete
    raise RuntimeError(f"{node}: its stream of samples ended")


async def leaks(directory: Path, epochs: int) -> dict[str, Any]:
    """Publishes epoch after epoch as soon as the last one ticked; counts what the agents hold before and after."""
    nodes = NODES[:2]
    async with running(directory, decide=False, attend_s=10.0) as agents:
        await agents.start_all(nodes)
        warm_up = 20
        began = time.monotonic()
        for epoch in range(1, warm_up + 1):
            await regroup(agents, nodes, epoch)
        before = {node: held(agents, node) for node in nodes}
        for epoch in range(warm_up + 1, warm_up + epochs + 1):
            await regroup(agents, nodes, epoch)
        took = time.monotonic() - began
        after = {node: held(agents, node) for node in nodes}
    grown = {what: max(after[node][what] - before[node][what] for node in nodes) for what in before[nodes[0]]}
    return {
        "epoch_changes": epochs,
        "epoch_change_s": took / (epochs + warm_up),
        "leaked_fds": max(grown["fds"], 0) + max(grown["threads"], 0) + max(grown["processes"], 0),
        "grown": grown,
    }


async def regroup(agents: Agents, nodes: tuple[str, ...], epoch: int) -> None:
    """One new epoch, until both have a complete sample of it."""
    group = membership_pb2.ThroughputGroup(epoch=epoch, backend="gloo", why="bench")
    for node in nodes:
        ready = agents.running[node].ready
        group.members.add(
            agent=ready["agent"], node=node, address=ready["address"], store_address=ready["store_address"]
        )
    agents.controller.publish(group, "bench")
    await asyncio.gather(*(agents.until(node, lambda s: s.complete and s.epoch == epoch) for node in nodes))


def held(agents: Agents, node: str) -> dict[str, int]:
    """Descriptors, threads, processes and resident memory of an agent and all it started."""
    pids = agents.running[node].left()
    pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
    return {
        "fds": sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids),
        "threads": sum(len(os.listdir(f"/proc/{pid}/task")) for pid in pids),
        "processes": len(pids),
        "rss_kb": pages * os.sysconf("SC_PAGE_SIZE") // 1024,
    }


async def counts(directory: Path) -> dict[str, Any]:
    """Three counts after scale-ups, drains, killed and frozen agents; then after kill -9 of a worker under load."""
    async with fleet(directory) as made:
        await graceful_chaos(made)
        graceful = await made.counts()
        await violent_chaos(made)
        violent = await made.counts(killed=("w2",))
    return {
        "counts_equal": graceful.equal and violent.equal and graceful.lost_in_flight == 0,
        "counted_tokens": violent.collective_workers,
        "lost_in_flight": violent.lost_in_flight,
        "requests": made.requests,
        "failed_requests": made.failures,
    }
