"""The collective on separate hosts: pulled cables, a cut path between two hosts, and a flapping one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from deploy.netns.hosts import Host, Network
from tests.support.throughput_cluster import Agents, count, row, running

RECOVERY_S = 3.0 * float(os.environ.get("MEGATOKEN_TEST_SLOWNESS", "2"))


@pytest.fixture
def shared_directory() -> Iterator[Path]:
    """Where hosts and this machine see the same files: every host has a /tmp of its own."""
    made = Path(tempfile.mkdtemp(prefix="mt-", dir="/var/tmp"))
    yield made
    shutil.rmtree(made, ignore_errors=True)


@contextlib.asynccontextmanager
async def agents_on(network: Network, directory: Path) -> AsyncIterator[Agents]:
    """An agent on each host, in one group; the controller is on this machine."""
    async with running(directory, controller_host=network.machine_address) as agents:
        await asyncio.gather(*(start(agents, host) for host in network.hosts))
        await agents.until_ranks([host.name for host in network.hosts], 90)
        yield agents


async def start(agents: Agents, host: Host) -> None:
    await agents.start(host.name, tuple(host.command([])), host=host.address)


async def recovered(agents: Agents, node: str, ranks: int, timeout_s: float = 60.0) -> tuple[float, int]:
    """(seconds until a complete sample of so many ranks, incomplete samples meanwhile)."""
    started, incomplete, before = time.monotonic(), 0, (await agents.sample(node)).epoch
    async with asyncio.timeout(timeout_s), agents.watch(node) as samples:
        async for sample in samples:
            if sample.complete and sample.ranks == ranks and sample.epoch > before:
                break
            incomplete += not sample.complete
    return time.monotonic() - started, incomplete


async def test_pulled_cut_and_flapping_links(make_network: Callable[[int], Network], shared_directory: Path) -> None:
    network = make_network(3)
    first, second, third = network.hosts
    async with agents_on(network, shared_directory) as agents:
        writer = agents.writer(third.name, "r2")
        count(writer, generated_tokens=700)
        await agents.until(first.name, lambda s: s.complete and made(s) == 700)

        # A pulled cable: the host is out for the others and for the controller.
        waiting = asyncio.create_task(recovered(agents, first.name, 2))
        await asyncio.sleep(0.1)
        third.link(up=False)
        seconds, incomplete = await waiting
        assert seconds < RECOVERY_S
        assert incomplete <= 1
        assert made(await agents.sample(first.name)) == 700
        count(writer, generated_tokens=50)  # its worker goes on, unseen
        third.link(up=True)
        await agents.until(first.name, lambda s: s.complete and s.ranks == 3 and made(s) == 750, 60)

        # Only the path between two hosts is cut: both still reach the controller and the third.
        waiting = asyncio.create_task(recovered(agents, first.name, 2))
        await asyncio.sleep(0.1)
        second.run(["ip", "route", "add", "blackhole", f"{third.address}/32"])
        seconds, incomplete = await waiting
        assert seconds < RECOVERY_S + 1
        assert incomplete <= 1
        epoch = (await agents.sample(first.name)).epoch
        whole = await agents.until(first.name, lambda s: s.complete and s.tick >= 8, 30)
        assert whole.epoch == epoch  # who was left out does not try to come back over a cut path
        second.run(["ip", "route", "del", "blackhole", f"{third.address}/32"])
        await agents.until_ranks([host.name for host in network.hosts], 60)

        # A cable with a loose contact.
        groups = len(agents.controller.groups)
        for _ in range(3):
            third.link(up=False)
            await asyncio.sleep(2.5)
            third.link(up=True)
            await asyncio.sleep(0.5)
        assert (await agents.sample(first.name)).complete
        assert len(agents.controller.groups) - groups <= 6
        await agents.until_ranks([host.name for host in network.hosts], 90)
        assert made(await agents.sample(first.name)) == 750


def made(sample: object) -> int:
    return int(row(sample, "cluster", "cluster").workers.generated_tokens)  # type: ignore[arg-type]
