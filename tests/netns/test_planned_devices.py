"""Replicas on the devices that were planned, on hosts whose Ray claims GPUs: vLLM's ranks say which they were given.

The ranks are real and compute on the CPU, since a variable of Ray's own environment has vLLM take the GPUs that Ray
counts for CPU slots (worker/engines/ranks/cpu_platform.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy.netns import hosts
from deploy.netns.ray_nodes import RayNodes
from megatoken.v1 import control_pb2
from tests.netns.host_clusters import HostCluster, running

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

START_S = 150.0
VISIBLE = "CUDA_VISIBLE_DEVICES"
NOT_SET = "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"  # as vLLM's platforms of accelerators have it for ranks
GIVEN = ("4", "5", "6", "7")  # what each host's Ray was given of its machine
SAID = re.compile(r"rank (\d+): host (\S+), process (\d+), device (\S+)")
PLANNED = re.compile(r"rank (\d+): (\S+) device (\d+)")


def model(name: str, **fields: Any) -> dict[str, Any]:
    return {
        "name": name,
        "source": "builtin:tiny-llama",
        "dtype": "float32",
        "max_model_len": 128,
        "max_running": 4,
        "kv_cache_gib": 0.1,
        "engine_args": {"enforce_eager": True},
        "env": {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1"},
        **fields,
    }


SPEC = {
    "models": [
        model("inside", replicas=2, parallel={"tensor": 2}),
        model("across", parallel={"pipeline": 2}, placement={"separate": "none"}),
    ]
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[HostCluster]:
    if reason := hosts.missing_requirement():
        pytest.skip(reason)
    env = {VISIBLE: ",".join(GIVEN), "MEGATOKEN_CPU_RAY_DEVICE": "GPU", NOT_SET: "1"}
    with hosts.Network.create(2) as network:
        nodes = RayNodes(network, 0, gpus=3, env=env)
        nodes.start()
        with running(nodes, SPEC) as started:
            yield started


def said_by_ranks(cluster: HostCluster, replica: control_pb2.ReplicaStatus) -> dict[int, tuple[str, str]]:
    """Host and device of each rank, as the ranks themselves saw it."""
    log = cluster.command("logs", replica.replica, "--lines", "400")
    return {int(rank): (host, device) for rank, host, _, device in SAID.findall(log)}


def planned(cluster: HostCluster, replica: control_pb2.ReplicaStatus) -> dict[int, tuple[str, str]]:
    """The same by `status`, in the driver's numbers."""
    names = {host.address: host.name for host in cluster.nodes.network.hosts}
    rows = (PLANNED.search(line) for line in replica.ranks)
    return {int(row[1]): (names[row[2]], GIVEN[int(row[3])]) for row in rows if row is not None}


def test_every_rank_runs_on_its_planned_device_and_no_two_share_one(cluster: HostCluster) -> None:
    replicas = [*cluster.wait_ready("inside", 2, START_S), *cluster.wait_ready("across", 1, START_S)]
    held = []
    for replica in replicas:
        assert planned(cluster, replica), replica.ranks
        assert said_by_ranks(cluster, replica) == planned(cluster, replica)
        held += planned(cluster, replica).values()
    assert len(held) == len(set(held)) == 6
    (across,) = [replica for replica in replicas if replica.model == "across"]
    assert len({host for host, _ in planned(cluster, across).values()}) == 2


def test_the_processes_of_a_replica_inside_a_node_see_its_devices_and_no_others(cluster: HostCluster) -> None:
    for replica in cluster.wait_ready("inside", 2, START_S):
        environ = Path(f"/proc/{cluster.worker_pid(replica)}/environ").read_bytes().decode().split("\0")
        seen = dict(entry.split("=", 1) for entry in environ if "=" in entry)
        devices = ",".join(device for _, device in planned(cluster, replica).values())
        assert (seen[VISIBLE], seen["HIP_VISIBLE_DEVICES"]) == (devices, devices)
