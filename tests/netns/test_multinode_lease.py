"""The order of a cut: the cut-off worker's service ends, and only then is it replaced.

The engines are simulated: what is shown here is the worker's fence and the controller's patience.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from deploy.netns.hosts import Network
from deploy.netns.ray_nodes import RayNodes
from tests.netns.host_clusters import Traffic, ask, running

LEASE_S = 12.0  # several times what a renewal and a look take
RENEWED_S = 3.0  # how old a lease may be when the cut comes
REPLACED_S = 30.0  # from the lease's end
TOKENS = 60
PROMPT = [(11 * place) % 4000 + 10 for place in range(16)]
SPEC = {
    "control": {"worker_lease_s": LEASE_S},
    "models": [
        {
            "name": "sim",
            "engine": "simulated",
            "replicas": 2,
            "simulated": {"step_s": 0.02},
            "placement": {"separate": "node"},
        }
    ],
}


@pytest.mark.timeout(400)
def test_a_cut_off_worker_ends_its_service_before_another_takes_its_place() -> None:
    with Network.create(4) as network:
        nodes = RayNodes(network, 2)
        nodes.start(devices={"node0": 0})  # the head serves no model; one of the other three is free
        with running(nodes, SPEC) as cluster:
            before = {row.replica for row in cluster.wait_ready("sim", 2)}
            (answer,) = ask(cluster.router, "sim", [PROMPT], TOKENS)
            lost = cluster.wait_ready("sim", 2)[0]
            host, worker = cluster.host_of(lost), Path(f"/proc/{cluster.worker_pid(lost)}")
            (log,) = Path(host.directory).rglob(f"{lost.replica}.log")
            with Traffic(cluster.router, "sim", [PROMPT], TOKENS, streams=6) as traffic:
                host.link(up=False)
                cut_s = time.monotonic()
                ended_s = 0.0
                # Whether it ended is looked at first: what is seen as replaced after that cannot have come before it.
                while True:
                    assert time.monotonic() < cut_s + LEASE_S + REPLACED_S, "it was not replaced"
                    if not ended_s and (not worker.exists() or "replica.fenced" in log.read_text()):
                        ended_s = time.monotonic()
                    if {row.replica for row in cluster.status().replicas} - before:
                        break
                    time.sleep(0.05)
                replaced_s = time.monotonic()
                now = {row.replica for row in cluster.wait_ready("sim", 2, REPLACED_S)}
                host.link(up=True)
                report = traffic.stop()
            assert ended_s, "it was replaced while it might have served"
            assert replaced_s - cut_s >= LEASE_S - RENEWED_S
            assert lost.replica not in now
            assert not report.errors
            assert report.answers
            assert all(got == answer for got in report.answers)
            print(f"ended {ended_s - cut_s:.1f} s and replaced {replaced_s - cut_s:.1f} s after the cut")
            nodes.stop_node(host)  # what Ray left of the node that it declared dead
