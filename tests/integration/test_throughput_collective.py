"""The collective with real agents, real gloo and real faults on loopback. One set of agents serves most tests."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
import pytest_asyncio

from megatoken.v1 import membership_pb2, throughput_pb2, throughput_pb2_grpc
from tests.support.throughput_cluster import Agents, count, row, running

RECOVERY_S = 3.0
SLOW_MACHINE = float(os.environ.get("MEGATOKEN_TEST_SLOWNESS", "2"))  # shared runners stall a process for seconds
NODES = ("n0", "n1", "n2")

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def agents(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Agents]:
    async with running(tmp_path_factory.mktemp("agents"), standalone_rates={"cpu": 100.0}) as made:
        await made.start_all(NODES)
        yield made


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def whole(agents: Agents) -> None:
    """Every test begins with all three in one group."""
    for node in NODES:
        if node not in agents.running:
            await agents.start(node)
    await agents.until_ranks(NODES, 60)


def tokens(sample: throughput_pb2.ThroughputSample, kind: str = "cluster", name: str = "cluster") -> int:
    return row(sample, kind, name).workers.generated_tokens


async def recovered(agents: Agents, node: str, ranks: int) -> tuple[float, int]:
    """(seconds until a complete sample of a later epoch, incomplete samples meanwhile)."""
    before = (await agents.sample(node)).epoch
    started, incomplete = time.monotonic(), 0
    async with asyncio.timeout(30), agents.watch(node) as samples:
        async for sample in samples:
            incomplete += not sample.complete
            if sample.complete and sample.epoch > before and sample.ranks == ranks:
                return time.monotonic() - started, incomplete
    raise AssertionError("the stream ended")


async def test_every_agent_serves_the_same_exact_sum(agents: Agents) -> None:
    base = tokens(await agents.sample("n0"))
    first, second = agents.writer("n0", "same-a"), agents.writer("n1", "same-b", model="other")
    router = agents.writer("n2", "same-router", kind="router")
    count(first, generated_tokens=1000, prompt_tokens=50, cached_tokens=20, energy_mj=7)
    count(second, generated_tokens=234, requests_started=3)
    count(router, generated_tokens=1234)
    for node in NODES:
        sample = await agents.until(node, lambda s: s.complete and tokens(s) == base + 1234)
        assert sample.backend == "gloo"
        assert tokens(sample, "replica", "same-a") == 1000
        assert tokens(sample, "model", "other") == 234
        assert row(sample, "cluster", "cluster").workers.energy_mj == 7
        assert row(sample, "node", "n2").routers.generated_tokens == 1234
        assert row(sample, "replica", "same-b").engine == "simulated"


async def test_rates_and_efficiency_follow_the_counters(agents: Agents) -> None:
    writer = agents.writer("n1", "steady")
    agents.controller.snapshot.replicas.add(replica="steady")
    agents.controller.push()
    ended = time.monotonic() + 5
    while time.monotonic() < ended:
        count(writer, generated_tokens=10)
        await asyncio.sleep(0.1)
    found = row(await agents.sample("n0"), "replica", "steady")
    rate = {window.seconds: window.generated_tokens_per_s for window in found.windows}
    assert rate[10] == pytest.approx(100, rel=0.3)
    assert rate[1] == pytest.approx(100, rel=0.6)
    assert found.efficiency == pytest.approx(rate[10] / 100.0, rel=0.01)


@pytest.mark.parametrize("victim", ["n1", "n0"])
async def test_a_killed_agent_costs_one_sample_at_most(agents: Agents, victim: str) -> None:
    writer = agents.writer(victim, f"killed-{victim}")
    count(writer, generated_tokens=111)
    await agents.until("n2", lambda s: s.complete and (victim, 111) == (victim, tokens_or_none(s, f"killed-{victim}")))
    before = tokens(await agents.sample("n2"))
    waiting = asyncio.create_task(recovered(agents, "n2", 2))
    await asyncio.sleep(0.2)
    await agents.kill(victim)
    seconds, incomplete = await waiting
    assert seconds < RECOVERY_S * SLOW_MACHINE
    assert incomplete <= 1
    assert tokens(await agents.sample("n2")) == before  # what it counted still counts
    count(writer, generated_tokens=9)  # its worker goes on
    await agents.start(victim)
    sample = await agents.until("n2", lambda s: s.complete and s.ranks == 3 and tokens(s) == before + 9)
    assert tokens(sample, "replica", f"killed-{victim}") == 120


def tokens_or_none(sample: throughput_pb2.ThroughputSample, replica: str) -> int | None:
    return next((r.workers.generated_tokens for r in sample.rows if (r.kind, r.name) == ("replica", replica)), None)


@pytest.mark.parametrize("whole_tree", [False, True], ids=["agent", "agent-and-reducer"])
async def test_a_frozen_agent_costs_one_sample_at_most_and_comes_back(agents: Agents, whole_tree: bool) -> None:
    victim = agents.running["n1"]
    frozen = victim.left() if whole_tree else [victim.pid]
    waiting = asyncio.create_task(recovered(agents, "n2", 2))
    await asyncio.sleep(0.2)
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    try:
        seconds, incomplete = await waiting
    finally:
        for pid in frozen:
            os.kill(pid, signal.SIGCONT)
    assert seconds < RECOVERY_S * SLOW_MACHINE
    assert incomplete <= 1
    await agents.until_ranks(NODES)


async def test_a_frozen_or_killed_reducer_is_replaced(agents: Agents) -> None:
    pids = agents.running["n1"].left()
    reducer = max(pids)  # forked last
    assert "forkserver" in Path(f"/proc/{reducer}/cmdline").read_bytes().decode()
    for number in (signal.SIGKILL, signal.SIGSTOP):
        reducer = max(agents.running["n1"].left())
        waiting = asyncio.create_task(recovered(agents, "n2", 3))
        await asyncio.sleep(0.1)
        os.kill(reducer, number)
        seconds, incomplete = await waiting
        assert seconds < 2 * RECOVERY_S * SLOW_MACHINE
        assert incomplete <= 2
        assert reducer not in agents.running["n1"].left()


async def test_a_killed_fork_server_is_started_again(agents: Agents) -> None:
    forkserver = next(pid for pid in agents.running["n1"].left() if parent(pid) == agents.running["n1"].pid)
    os.kill(forkserver, signal.SIGKILL)
    await agents.until("n2", lambda s: s.complete and s.ranks == 2)
    await agents.until_ranks(NODES, 60)
    assert forkserver not in agents.running["n1"].left()


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


async def test_a_controller_restart_stops_nothing(agents: Agents) -> None:
    before = await agents.sample("n0")
    controller = agents.controller
    await controller.stop()
    await agents.until("n0", lambda s: s.complete and s.epoch == before.epoch and s.tick >= before.tick + 3)
    controller.snapshot = membership_pb2.Snapshot(epoch=controller.snapshot.epoch + 1, version=1)
    await controller.start()
    await asyncio.sleep(4)
    after = await agents.sample("n0")
    assert (after.epoch, after.complete, after.ranks) == (before.epoch, True, 3)
    assert controller.attendance.groups.group.epoch == before.epoch
    assert controller.attendance.groups.group.why == "adopted from the controller before"


async def test_a_counter_that_goes_backwards_is_named_and_survived(agents: Agents) -> None:
    writer = agents.writer("n0", "fell")
    count(writer, generated_tokens=500)
    await agents.until("n1", lambda s: tokens_or_none(s, "fell") == 500)
    count(writer, generated_tokens=-400)
    await asyncio.sleep(2.5)
    assert tokens_or_none(await agents.sample("n1"), "fell") == 500
    assert (
        "generated_tokens of worker fell (incarnation 1) went backwards from 500 to 100"
        in agents.running["n0"].output()
    )


async def test_metrics_say_what_the_sample_says(agents: Agents) -> None:
    url = f"http://{agents.running['n0'].ready['metrics_address']}/metrics"
    text = await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=10).read().decode())
    sample = await agents.sample("n0")
    found = re.search(
        r'^megatoken_throughput_generated_tokens_total\{ledger="workers",name="cluster",scope="cluster"\} (\S+)$',
        text,
        re.M,
    )
    assert found
    assert float(found[1]) <= tokens(sample)
    assert f"megatoken_throughput_epoch {float(sample.epoch)}" in text
    assert "megatoken_throughput_ranks 3.0" in text
    assert 'megatoken_agent_info{backend="gloo"} 1.0' in text
    assert "megatoken_agent_collective_seconds_bucket" in text


async def test_an_agent_of_another_version_is_kept_out_with_a_reason(agents: Agents) -> None:
    member = membership_pb2.ThroughputMember(agent="old", node="old", address="x:1", store_address="x:2")
    message = throughput_pb2.Attendance(member=member, backends=["gloo"], wire_version=99)
    epoch = (await agents.sample("n0")).epoch
    async with grpc.aio.insecure_channel(agents.controller.address) as channel:
        call = throughput_pb2_grpc.ThroughputAttendanceStub(channel).Attend()
        for _ in range(5):
            await call.write(message)
            reply = await call.read()
            await asyncio.sleep(0.2)
        call.cancel()
    assert "agent old on node old speaks version 99 of the throughput vector" in reply.refused
    assert reply.refusal == throughput_pb2.ATTENDANCE_REFUSAL_WIRE_VERSION
    assert (await agents.sample("n0")).epoch == epoch


async def test_sites_reduce_in_a_hierarchy_and_agree(tmp_path: Path) -> None:
    async with running(tmp_path) as made:
        sites = {"a0": "oslo", "a1": "oslo", "b0": "paris"}
        writers = {node: made.writer(node, f"r-{node}", site=site) for node, site in sites.items()}
        for number, writer in enumerate(writers.values()):
            count(writer, generated_tokens=10**number)
        await asyncio.gather(*(made.start(node, site=site) for node, site in sites.items()))
        await made.until_ranks(tuple(sites), 60)
        assert made.controller.groups[-1][1].hierarchical
        for node in sites:
            sample = await made.until(node, lambda s: s.complete and tokens(s) == 111)
            assert (tokens(sample, "site", "oslo"), tokens(sample, "site", "paris")) == (11, 100)
        await made.kill("a0")  # the first of its site, and of the group
        await made.until_ranks(("a1", "b0"))


async def test_no_controller_and_no_group_is_said(tmp_path: Path) -> None:
    async with running(tmp_path) as made:
        await made.controller.stop()
        await made.start("n0")
        sample = await made.sample("n0")
        assert not sample.complete
        assert sample.incomplete_reason == "no tick yet"
        await made.controller.start()
        await made.until_ranks(("n0",))
