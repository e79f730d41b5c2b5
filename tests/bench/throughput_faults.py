"""Recovery from kill -9 of agents, what 1,000 epoch changes leave behind, and the three counts after chaos."""

from __future__ import annotations

import asyncio
import math
import os
import time
from pathlib import Path
from typing import Any

import grpc

from megatoken.v1 import membership_pb2
from tests.support.throughput_chaos import fleet, graceful_chaos, violent_chaos
from tests.support.throughput_cluster import Agents, running

NODES = ("n0", "n1", "n2", "n3", "n4")
FEWEST = 3  # in the group when one is killed


async def recovery(directory: Path, kills: int, earlier: dict[str, Any]) -> dict[str, Any]:
    """Kills one agent after another, each at another moment of the tick, while the killed ones start again beside it.

    What counts is the time from the kill to the first complete sample of a group without the victim, at the slowest of
    the others. `earlier` may hold the kills of a run before, which then count too.
    """
    seconds: list[float] = list(earlier.get("recovery_s", ()))
    incomplete: list[int] = [earlier.get("incomplete_samples_max", 0)]
    starting: set[asyncio.Task[Any]] = set()
    async with running(directory) as agents:
        await agents.start_all(NODES)
        try:
            for number in range(kills):
                cost = await kill_one(agents, number)
                seconds.append(cost[0])
                incomplete.append(cost[1])
                starting.add(asyncio.create_task(agents.start(cost[2])))
                if number % 10 == 9:
                    print(f"  {number + 1} kills, slowest recovery {max(seconds):.2f} s", flush=True)
        except (TimeoutError, grpc.aio.AioRpcError) as error:  # a starved machine: what was measured stands
            print(f"  ended early: {type(error).__name__}", flush=True)
        await asyncio.gather(*starting, return_exceptions=True)
    seconds.sort()
    p99 = seconds[math.ceil(0.99 * len(seconds)) - 1]  # nearest rank; the slowest is stated beside it
    return {
        "kills": len(seconds),
        "recovery_s": seconds,
        "recovery_s_p50": seconds[len(seconds) // 2],
        "recovery_s_p99": p99,
        "recovery_s_max": seconds[-1],
        "incomplete_samples_max": max(incomplete),
    }


async def kill_one(agents: Agents, number: int) -> tuple[float, int, str]:
    """(seconds to recover, incomplete samples meanwhile, the victim's node)."""
    victim = await next_victim(agents)
    agent = agents.running[victim].ready["agent"]
    others = [node for node in in_group(agents) if node != victim]
    at = {node: await agents.sample(node) for node in others}
    await asyncio.sleep((number % 10) / 10)
    killed = time.monotonic()
    await agents.kill(victim)
    ends = await asyncio.gather(*(recovered(agents, node, agent, at[node].epoch) for node in others))
    return max(end for end, _ in ends) - killed, max(missed for _, missed in ends), victim


def in_group(agents: Agents) -> list[str]:
    """Nodes whose running agent is in the newest group, longest first."""
    members = (
        {member.agent for member in agents.controller.groups[-1][1].members} if agents.controller.groups else set()
    )
    return [node for node, started in agents.running.items() if started.ready["agent"] in members]


async def next_victim(agents: Agents) -> str:
    """Waits for a group of at least FEWEST that has summed; returns its longest member."""
    async with asyncio.timeout(120):
        while True:
            nodes = in_group(agents)
            if len(nodes) >= FEWEST:
                samples = [await agents.sample(node) for node in nodes]
                epoch = agents.controller.groups[-1][1].epoch
                if all(sample.complete and sample.epoch == epoch for sample in samples):
                    return nodes[0]
            await asyncio.sleep(0.05)


async def recovered(agents: Agents, node: str, victim: str, epoch: int) -> tuple[float, int]:
    """(when the first complete sample of a later group without the victim came, incomplete ones before it)."""
    incomplete = 0
    async with asyncio.timeout(60), agents.watch(node) as samples:
        async for sample in samples:
            if sample.complete and sample.epoch > epoch and victim not in members_of(agents, sample.epoch):
                return time.monotonic(), incomplete
            incomplete += not sample.complete
    raise RuntimeError(f"{node}: its stream of samples ended")


def members_of(agents: Agents, epoch: int) -> set[str]:
    """The agents of an epoch that was published."""
    groups = (group for _, group in agents.controller.groups if group.epoch == epoch)
    return {member.agent for group in groups for member in group.members}


async def leaks(directory: Path, epochs: int) -> dict[str, Any]:
    """Publishes epoch after epoch as soon as the last one ticked; counts what the agents hold before and after."""
    nodes = NODES[:2]
    async with running(directory, decide=False, attend_s=10.0) as agents:
        await agents.start_all(nodes)
        warm_up = 20
        began = time.monotonic()
        failed = sum([await regroup(agents, nodes, epoch) for epoch in range(1, warm_up + 1)])
        before = {node: held(agents, node) for node in nodes}
        failed += sum([await regroup(agents, nodes, epoch) for epoch in range(warm_up + 1, warm_up + epochs + 1)])
        took = time.monotonic() - began
        after = {node: held(agents, node) for node in nodes}
    grown = {what: max(after[node][what] - before[node][what] for node in nodes) for what in before[nodes[0]]}
    return {
        "epoch_changes": epochs,
        "epochs_not_formed": failed,
        "epoch_change_s": took / (epochs + warm_up),
        "leaked_fds": max(grown["fds"], 0) + max(grown["threads"], 0) + max(grown["processes"], 0),
        "grown": grown,
    }


async def regroup(agents: Agents, nodes: tuple[str, ...], epoch: int) -> int:
    """One new epoch, until both have a complete sample of it; 1 when it did not form in time (a starved machine)."""
    group = membership_pb2.ThroughputGroup(epoch=epoch, backend="gloo", why="bench")
    for node in nodes:
        ready = agents.running[node].ready
        group.members.add(
            agent=ready["agent"], node=node, address=ready["address"], store_address=ready["store_address"]
        )
    agents.controller.publish(group, "bench")
    waits = [agents.until(node, lambda s: s.complete and s.epoch == epoch, 10.0) for node in nodes]
    return int(any(isinstance(ended, BaseException) for ended in await asyncio.gather(*waits, return_exceptions=True)))


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
