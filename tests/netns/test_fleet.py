"""One fleet with everything on, as a user launches it, while its parts die one after the other: `make fleet`.

Three hosts; mutual TLS, API keys, agents, a router and an edge on each; real vLLM: SmolLM2 with two stages, and the
tiny Llama with two stages of two. `megatoken up` over ssh; the official openai client streams through the edges all the
time, greedy and in float32, so that every answer is known beforehand.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deploy.netns import hosts
from deploy.netns.hosts import Host, Network
from tests.netns.fleet import Clients, Fleet, tagged
from tests.netns.sshd import MISSING

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.fleet,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(MISSING), reason=MISSING),
]

TOLD_S = 5.0  # from Ray's knowing to `status` saying it
DETECTED_S = 15.0  # Ray's own health checks
HANG_S = 20.0
SERVED_S = 120.0  # a replacement's engine
RETURNED_S = 150.0  # a node that comes back, and what stood there


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    if reason := hosts.missing_requirement():
        pytest.skip(reason)
    with Network.create(3) as network:
        made = Fleet(network, tmp_path_factory.mktemp("fleet"))
        try:
            made.up()
            yield made
        finally:
            made.down()


@pytest.fixture(scope="module")
def clients(fleet: Fleet) -> Iterator[Clients]:
    """They ask from the first test to the last."""
    with Clients(fleet) as started:
        yield started


def lose(fleet: Fleet, replica: str, act: Callable[[], None], told_s: float = TOLD_S) -> str:
    """Does harm to a replica; why `status` says that it failed."""
    act()
    rows = fleet.wait(lambda status: replica in fleet.failed(status), told_s).replicas
    return next(row.reason for row in rows if row.replica == replica)


def test_every_part_is_there_and_answers_are_those_of_one_engine(fleet: Fleet, clients: Clients) -> None:
    status = fleet.status()
    kinds = [row.kind for row in status.processes]
    assert sorted(set(kinds)) == ["agent", "edge", "router"]
    assert all(kinds.count(kind) == 3 for kind in ("agent", "edge", "router"))
    (tiny,) = fleet.ready("tiny", 1)
    assert len(tiny.ranks) == 4
    assert len(fleet.hosts_of(tiny)) == 2
    clients.answered(2)


def test_replicas_scale_up_and_one_spans_two_hosts(fleet: Fleet, clients: Clients) -> None:
    fleet.scale("smol", 2)
    replicas = fleet.ready("smol", 2, SERVED_S)
    assert 2 in {len(fleet.hosts_of(replica)) for replica in replicas}
    clients.answered(2)


def test_a_killed_rank_is_named_and_its_replica_replaced(fleet: Fleet, clients: Clients) -> None:
    (replica,) = fleet.ready("tiny", 1)
    host = fleet.hosts_of(replica)[-1]
    rank = tagged(fleet, host, replica.replica, "rank")[-1]
    reason = lose(fleet, replica.replica, lambda: os.kill(rank, signal.SIGKILL))
    assert "rank 3" in reason
    assert host.address in reason
    fleet.ready("tiny", 1, SERVED_S)
    clients.answered(1)


def test_a_frozen_rank_is_named_with_its_node_and_replaced(fleet: Fleet, clients: Clients) -> None:
    (replica,) = fleet.ready("tiny", 1)
    host = fleet.hosts_of(replica)[-1]
    rank = tagged(fleet, host, replica.replica, "rank")[-1]
    reason = lose(fleet, replica.replica, lambda: os.kill(rank, signal.SIGSTOP), 2 * HANG_S + TOLD_S)
    assert "is stopped" in reason or "lost" in reason  # whichever sees it first: our probe, or Ray's own check
    assert "rank 3" in reason
    assert host.address in reason
    fleet.ready("tiny", 1, SERVED_S)
    assert not Path(f"/proc/{rank}").exists()
    clients.answered(1)


@pytest.mark.parametrize("part", ["engine", "worker"])
def test_a_killed_engine_core_or_worker_is_replaced(fleet: Fleet, clients: Clients, part: str) -> None:
    replica = fleet.ready("smol", 2)[0 if part == "engine" else -1]
    victim = tagged(fleet, fleet.hosts_of(replica)[0], replica.replica, part)[0]
    assert lose(fleet, replica.replica, lambda: os.kill(victim, signal.SIGKILL))
    fleet.ready("smol", 2, SERVED_S)
    clients.answered(1)


@pytest.mark.parametrize("program", ["router", "router.edge"])
def test_a_killed_router_or_edge_is_started_again(fleet: Fleet, clients: Clients, program: str) -> None:
    host = fleet.network.hosts[1]
    kind = program.rpartition(".")[2]
    (victim,) = fleet.pids(host, f"-m megatoken.{program} ")
    os.kill(victim, signal.SIGKILL)
    deadline = time.monotonic() + SERVED_S
    while not (now := [pid for pid in fleet.pids(host, f"-m megatoken.{program} ") if pid != victim]):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    fleet.wait(lambda status: all(row.state == "READY" for row in status.processes if row.kind == kind), SERVED_S)
    assert len(now) == 1
    clients.answered(1)


def test_a_killed_controller_returns_and_nothing_else_moves(fleet: Fleet, clients: Clients) -> None:
    before = {row.replica for row in fleet.status().replicas if row.state == "READY"}
    (controller,) = fleet.pids(fleet.head, "ray::ControllerActor")
    os.kill(controller, signal.SIGKILL)
    clients.answered(1)
    after = fleet.wait(lambda status: any(row.state == "READY" for row in status.replicas), 60.0)
    assert {row.replica for row in after.replicas if row.state == "READY"} == before


def test_a_rolling_update_exchanges_a_model_under_traffic(fleet: Fleet, clients: Clients) -> None:
    before = {row.replica for row in fleet.ready("smol", 2)}
    fleet.change_model("smol", max_running=6)
    fleet.wait(lambda status: not before & {row.replica for row in status.replicas if row.state == "READY"}, SERVED_S)
    fleet.ready("smol", 2, SERVED_S)
    clients.answered(1)


def away(fleet: Fleet, host: Host, act: Callable[[], None]) -> set[str]:
    """Takes a node away; the replicas that stood on it, all of them said to have failed."""
    stood = {row.replica for row in fleet.status().replicas if row.state == "READY" and host in fleet.hosts_of(row)}
    act()
    fleet.wait(lambda status: stood <= fleet.failed(status), DETECTED_S + TOLD_S)
    return stood


def test_a_node_whose_ray_was_killed_is_used_again(fleet: Fleet, clients: Clients) -> None:
    stood = away(fleet, fleet.network.hosts[2], lambda: fleet.crash_ray(fleet.network.hosts[2]))
    assert stood
    fleet.ready("smol", 2, RETURNED_S)
    fleet.ready("tiny", 1, RETURNED_S)
    clients.answered(1)


def test_a_node_that_was_cut_off_is_used_again(fleet: Fleet, clients: Clients) -> None:
    host = fleet.network.hosts[2]
    stood = away(fleet, host, lambda: host.link(up=False))
    blocked = fleet.wait(lambda status: bool(fleet.blocked(status, "tiny")), DETECTED_S)
    assert "node" in fleet.blocked(blocked, "tiny")
    host.link(up=True)
    assert stood
    fleet.ready("smol", 2, RETURNED_S)
    fleet.ready("tiny", 1, RETURNED_S)
    clients.answered(1)


def test_replicas_scale_down_and_no_request_was_lost_or_answered_otherwise(fleet: Fleet, clients: Clients) -> None:
    fleet.scale("smol", 1)
    fleet.ready("smol", 1, SERVED_S)
    report = clients.stop()
    assert report.wrong == []
    assert report.lost == []
    assert min(report.answers.values()) > 5, report.answers
    print(report)
