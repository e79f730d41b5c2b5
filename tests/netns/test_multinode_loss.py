"""What a fleet on separate hosts does when a part is lost while clients stream: no request lost, nothing left.

The engines are simulated: what is shown here is the control plane, the router, and Ray. What the whole fleet shows with
real engines is not repeated.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.netns import hosts
from deploy.netns.ray_nodes import RayNodes
from megatoken.v1 import control_pb2
from tests.netns.host_clusters import HostCluster, Report, Traffic, ask, running

pytestmark = pytest.mark.timeout(400)

TOKENS = 60
PROMPTS = [[(11 * request + 5 * place) % 4000 + 10 for place in range(16)] for request in range(4)]
SPEC = {
    "models": [
        {
            "name": "sim",
            "engine": "simulated",
            "replicas": 3,
            "simulated": {"step_s": 0.02},
            "placement": {"separate": "node"},
        }
    ]
}
MISLED = "node3"  # its operator named an interface that it does not have
TOLD_S = 5.0  # from Ray's knowing to `status` saying it
DETECTED_S = 12.0  # Ray's own health checks, at the settings of deploy/netns, with room for a busy machine
REPLACED_S = 30.0
CHECKED_S = 90.0  # a load of the device, and an all-reduce with each of two others
RETURNED_S = 90.0  # for a node to come back by itself: pauses of its supervisor, Ray's start, and the replica's


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    if reason := hosts.missing_requirement():
        pytest.skip(reason)
    with hosts.Network.create(4) as network:
        ray_nodes = RayNodes(network, 2)
        # The head serves no model, so losses never take the router.
        ray_nodes.start(devices={"node0": 0}, env={MISLED: {"GLOO_SOCKET_IFNAME": "eth9"}})
        yield ray_nodes


@pytest.fixture(scope="module")
def cluster(nodes: RayNodes) -> Iterator[HostCluster]:
    with running(nodes, SPEC) as started:
        yield started


@pytest.fixture(scope="module")
def expected(cluster: HostCluster) -> dict[int, list[int]]:
    """What each prompt is answered with when nothing is lost."""
    cluster.wait_ready("sim", 3)
    return {
        prompt[0]: answer for prompt, answer in zip(PROMPTS, ask(cluster.router, "sim", PROMPTS, TOKENS), strict=True)
    }


def check(report: Report, expected: dict[int, list[int]]) -> None:
    """Every answer is whole and exact; at least one request was on its way when the part was lost."""
    assert not report.errors
    known = list(expected.values())
    wrong = [answer for answer in report.answers if answer not in known]
    assert not wrong, f"{len(wrong)} of {len(report.answers)} answers differ, first: {wrong[0]}"
    assert len(report.answers) >= len(PROMPTS)


def ids(status: control_pb2.ClusterStatus, *states: str) -> set[str]:
    return {row.replica for row in status.replicas if row.state in states}


def node_state(status: control_pb2.ClusterStatus, address: str) -> str:
    return next((row.state for row in reversed(status.nodes) if row.address == address), "")


def open_ports(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=1).close()
    except OSError:
        return False
    return True


def test_a_device_returns_only_once_an_all_reduce_with_another_node_succeeds(
    cluster: HostCluster, expected: dict[int, list[int]]
) -> None:
    """The devices are spare ones: no replica moves."""
    well, _, misled = [host.address for host in cluster.nodes.network.hosts[1:]]
    held = {line.partition(": ")[2] for row in cluster.wait_ready("sim", 3) for line in row.ranks}
    devices = {}
    for address in (well, misled):
        spare = next(index for index in (0, 1) if f"{address} device {index}" not in held)
        devices[address] = f"{address}:{spare}"
        cluster.command("cordon", devices[address], "--reason", "its cable was moved")
        cluster.command("cordon", devices[address], "--undo")

    def out(status: control_pb2.ClusterStatus) -> dict[str, str]:
        return {row.address: text for row in status.nodes for text in row.devices_out}

    settled = cluster.wait(lambda status: "a check: " in out(status).get(misled, ""), CHECKED_S)
    assert out(settled)[misled].count("no all-reduce with ") == 2
    assert "eth9" in out(settled)[misled]
    cluster.wait(lambda status: well not in out(status), CHECKED_S)
    assert f"{devices[well]}: back in service" in cluster.events()


def test_a_worker_whose_actor_was_killed_is_replaced_under_a_new_id(
    cluster: HostCluster, expected: dict[int, list[int]]
) -> None:
    lost = cluster.wait_ready("sim", 3)[0]
    worker = cluster.worker_pid(lost)
    actor = int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])
    with Traffic(cluster.router, "sim", PROMPTS, TOKENS, streams=6) as traffic:
        cluster.wait(lambda status: any(row.running for row in status.replicas if row.replica == lost.replica), TOLD_S)
        os.kill(actor, signal.SIGKILL)
        status = cluster.wait(lambda status: lost.replica in ids(status, "FAILED"), TOLD_S)
        reason = next(row.reason for row in status.replicas if row.replica == lost.replica)
        now = cluster.wait_ready("sim", 3, REPLACED_S)
        report = traffic.stop()
    assert reason
    assert lost.replica not in {row.replica for row in now}
    assert not Path(f"/proc/{worker}").exists()
    check(report, expected)
    assert report.resumes >= 1


def test_a_power_cut_blocks_its_replica_until_the_node_is_there_again(
    cluster: HostCluster, expected: dict[int, list[int]]
) -> None:
    lost = cluster.wait_ready("sim", 3)[-1]
    host = cluster.host_of(lost)
    with Traffic(cluster.router, "sim", PROMPTS, TOKENS, streams=6) as traffic:
        host.power_off()
        blocked = cluster.wait(lambda status: bool(status.models[0].blocked), DETECTED_S + TOLD_S)
        report = traffic.stop()
    check(report, expected)
    assert lost.replica in ids(blocked, "FAILED")
    assert "node" in blocked.models[0].blocked
    assert node_state(blocked, host.address) == "dead"
    host.power_on(owned=True)
    cluster.nodes.start_node(host)
    cluster.wait_ready("sim", 3, REPLACED_S)


def test_a_partitioned_node_is_fenced_and_its_replica_never_serves_under_its_old_id(
    cluster: HostCluster, expected: dict[int, list[int]]
) -> None:
    lost = cluster.wait_ready("sim", 3)[1]
    host = cluster.host_of(lost)
    worker = cluster.worker_pid(lost)
    with Traffic(cluster.router, "sim", PROMPTS, TOKENS, streams=6) as traffic:
        host.link(up=False)
        began = time.monotonic()
        cluster.wait(lambda status: lost.replica in ids(status, "FAILED"), DETECTED_S + TOLD_S)
        deadline = began + 40
        while Path(f"/proc/{worker}").exists():
            assert time.monotonic() < deadline, "the cut-off worker still runs"
            time.sleep(0.1)
        host.link(up=True)
        report = traffic.stop()
    check(report, expected)
    assert not open_ports(lost.address)
    now = cluster.wait_ready("sim", 3, RETURNED_S)  # its Ray ended itself, and was started again once it had a link
    assert host.address in {row.address.rpartition(":")[0] for row in now}
    assert lost.replica not in {row.replica for row in now}


def test_a_short_cut_of_the_cable_loses_nothing(cluster: HostCluster, expected: dict[int, list[int]]) -> None:
    """Half a second without a link is neither a dead node nor a dead replica."""
    before = {row.replica for row in cluster.wait_ready("sim", 3)}
    host = cluster.host_of(cluster.wait_ready("sim", 3)[0])
    with Traffic(cluster.router, "sim", PROMPTS, TOKENS, streams=6) as traffic:
        host.link(up=False)
        time.sleep(0.5)
        host.link(up=True)
        time.sleep(2.0)
        report = traffic.stop()
    check(report, expected)
    assert {row.replica for row in cluster.wait_ready("sim", 3)} == before


def test_the_controllers_death_pauses_no_stream_and_everything_is_adopted(
    cluster: HostCluster, expected: dict[int, list[int]]
) -> None:
    before = cluster.wait_ready("sim", 3)
    (controller,) = cluster.nodes.ray_pids(cluster.nodes.head, "ray::ControllerActor")
    with Traffic(cluster.router, "sim", PROMPTS, TOKENS, streams=6) as traffic:
        traffic.report.longest_gap_s = 0.0
        os.kill(controller, signal.SIGKILL)
        time.sleep(1.0)
        now = cluster.wait_ready("sim", 3, REPLACED_S)
        report = traffic.stop()
    check(report, expected)
    assert report.resumes == 0
    assert report.longest_gap_s < 1.0
    assert {(row.replica, row.incarnation) for row in now} == {(row.replica, row.incarnation) for row in before}
