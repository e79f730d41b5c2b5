"""The loss of the head's GCS. Ray keeps it in memory, so its cluster ends; ours must end cleanly with it.

Nothing may hang, nothing may be left running on any host, and the same cluster must come up again on a new Ray.
"""

from __future__ import annotations

import os
import signal
import time

import pytest

from deploy.netns.hosts import Network
from deploy.netns.ray_nodes import RayNodes
from tests.netns.host_clusters import HostCluster, Traffic, ask

pytestmark = pytest.mark.timeout(400)

PROMPT = list(range(20, 40))
SPEC = {"models": [{"name": "sim", "engine": "simulated", "replicas": 2, "simulated": {"step_s": 0.02}}]}
ENDED_S = 45.0
SERVED_S = 30.0
STREAMS = 4
OURS = ("-m megatoken.worker", "-m megatoken.router", "ProcessActor", "ControllerActor")


def ours(network: Network) -> dict[int, str]:
    return {
        pid: f"{host.name}: {command}"
        for host in network.hosts
        for pid, command in host.processes().items()
        if any(word in command for word in OURS)
    }


def test_without_its_gcs_a_cluster_ends_on_every_host_and_can_be_started_again() -> None:
    with Network.create(2) as network:
        nodes = RayNodes(network, 1)
        nodes.start()
        cluster = HostCluster(nodes, SPEC)
        with cluster.control:
            cluster.up()
            cluster.wait_ready("sim", 2)
            answer = ask(cluster.router, "sim", [PROMPT], 50)
            (gcs,) = nodes.ray_pids(nodes.head, "gcs_server")
            with Traffic(cluster.router, "sim", [PROMPT], 50, streams=STREAMS) as traffic:
                served_by = time.monotonic() + SERVED_S
                while (
                    len(traffic.report.answers) < STREAMS
                ):  # so that the loss meets traffic, and there is what to judge
                    assert time.monotonic() < served_by, f"{traffic.report} {SERVED_S} s after the first request"
                    time.sleep(0.05)
                os.kill(gcs, signal.SIGKILL)
                deadline = time.monotonic() + ENDED_S
                while left := ours(network):
                    assert time.monotonic() < deadline, f"still running {ENDED_S} s after the GCS: {left}"
                    time.sleep(0.1)
                report = traffic.stop(30)  # a stream that hangs fails here
        assert len(report.answers) >= STREAMS
        assert all(got == answer[0] for got in report.answers)
        said = cluster.command("status", check=False)
        assert "cannot be reached" in said
        for host in network.hosts:
            nodes.stop_node(host)
        nodes.start()
        again = HostCluster(nodes, SPEC)
        with again.control:
            again.up()
            again.wait_ready("sim", 2)
            assert ask(again.router, "sim", [PROMPT], 50) == answer
            again.down()
