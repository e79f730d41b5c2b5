"""Real vLLM replicas that span hosts, through `megatoken up`, the router and a client, and the loss of a rank."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deploy.netns import hosts
from deploy.netns.ray_nodes import RayNodes
from megatoken.v1 import control_pb2
from tests.netns.engines import start_worker
from tests.netns.host_clusters import HostCluster, Traffic, ask, running

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

TINY = "builtin:tiny-llama"
TOKENS = 160
PROMPTS = [[(13 * request + 7 * place) % 4000 + 10 for place in range(24)] for request in range(3)]
START_S = 420.0
REPLACED_S = 300.0
SPEC = {
    "models": [
        {
            "name": "tiny",
            "source": TINY,
            "replicas": 2,
            "parallel": {"pipeline": 2},
            "dtype": "float32",
            "max_model_len": 512,
            "max_running": 8,
            "kv_cache_gib": 0.25,
            "cpu_threads": 1,
        }
    ]
}


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    """Three nodes of 1, 2 and 1 slots: of two replicas of two stages one fits inside a host, and one across two."""
    if reason := hosts.missing_requirement():
        pytest.skip(reason)
    with hosts.Network.create(3) as network:
        ray_nodes = RayNodes(network, 1)
        ray_nodes.start(devices={"node0": 1, "node1": 2, "node2": 1})
        yield ray_nodes


@pytest.fixture(scope="module")
def expected(nodes: RayNodes) -> list[list[int]]:
    """What one engine in one process answers."""
    alone = start_worker(nodes, nodes.head, None, source=TINY)
    answers = [alone.generate(prompt, TOKENS) for prompt in PROMPTS]
    assert alone.stop() == 0
    return answers


@pytest.fixture(scope="module")
def cluster(nodes: RayNodes, expected: list[list[int]]) -> Iterator[HostCluster]:
    with running(nodes, SPEC) as started:
        yield started


def ranks_on(replica: control_pb2.ReplicaStatus, host: hosts.Host) -> list[str]:
    return [line for line in replica.ranks if f" {host.address} " in line or f" {host.name} " in line]


def test_two_replicas_span_three_hosts_and_answer_as_one_engine_does(
    cluster: HostCluster, expected: list[list[int]]
) -> None:
    replicas = cluster.wait_ready("tiny", 2, START_S)
    assert all(len(replica.ranks) == 2 for replica in replicas)
    hosts_of = [
        [host.name for host in cluster.nodes.network.hosts for _ in ranks_on(replica, host)] for replica in replicas
    ]
    assert sorted(hosts_of) == [["node0", "node2"], ["node1", "node1"]], (
        "one across hosts, by Ray, and one inside, without"
    )
    placed = [len(cluster.nodes.ray_pids(host, "CpuRank")) for host in cluster.nodes.network.hosts]
    assert placed == [1, 0, 1]
    assert ask(cluster.router, "tiny", PROMPTS, TOKENS) == expected


def test_a_killed_rank_moves_its_streams_and_its_replica_is_replaced(
    cluster: HostCluster, expected: list[list[int]]
) -> None:
    before = {row.replica for row in cluster.wait_ready("tiny", 2, START_S)}
    far = cluster.nodes.network.hosts[2]
    (rank,) = cluster.nodes.ray_pids(far, "CpuRank")
    with Traffic(cluster.router, "tiny", PROMPTS, TOKENS, streams=4) as traffic:
        os.kill(rank, signal.SIGKILL)
        status = cluster.wait(lambda status: any(row.state == "FAILED" for row in status.replicas), 15)
        after = {row.replica for row in cluster.wait_ready("tiny", 2, REPLACED_S)}
        report = traffic.stop(120)
    lost = next(row for row in status.replicas if row.state == "FAILED")
    assert lost.reason
    assert lost.replica in before
    assert lost.replica not in after
    assert not report.errors
    assert report.answers
    assert all(answer in expected for answer in report.answers)
    assert report.resumes >= 1


def test_the_documented_spec_starts_on_two_nodes(make_ray_nodes: Callable[[int, int], RayNodes]) -> None:
    """deploy/netns/two-nodes.yaml, as its README says."""
    nodes = make_ray_nodes(2, 1)
    cluster = HostCluster(nodes, {})
    cluster.up(str(Path(hosts.__file__).with_name("two-nodes.yaml")))
    with cluster.control:
        (replica,) = cluster.wait_ready("smollm2-135m-instruct", 1, START_S)
        assert len({line.split()[2] for line in replica.ranks}) == 2, replica.ranks
        said = cluster.command("generate", "What is the capital of Japan?", timeout_s=120)
        assert "Tokyo" in said
        cluster.down()
