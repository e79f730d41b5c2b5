"""The head's control store with Redis (Debian's) behind it: killed under traffic, it returns, and the fleet goes on."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.netns import hosts
from deploy.netns.hosts import Network
from deploy.netns.ray_nodes import RayNodes
from tests.netns.host_clusters import HostCluster, Traffic, ask

REDIS = shutil.which("redis-server")
pytestmark = [
    pytest.mark.timeout(400),
    pytest.mark.skipif(REDIS is None, reason="redis-server is not installed"),
]

PORT = 6390
PROMPT = list(range(20, 40))
TOKENS = 150
STEP_S = 0.02
MODEL = {"name": "sim", "engine": "simulated", "replicas": 2, "simulated": {"step_s": STEP_S}}
STREAMS = 4
PAUSE_S = (
    2.0  # of a stream, on two busy cores; without the store a stream would be cut, and with its return pause for 5 s
)
SERVED_S = 90.0


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[RayNodes]:
    if reason := hosts.missing_requirement():
        pytest.skip(reason)
    with Network.create(2) as network:
        options = ["--port", str(PORT), "--bind", network.machine_address, "--save", "", "--dir", str(tmp_path)]
        redis = subprocess.Popen([str(REDIS), *options, "--protected-mode", "no"], stdout=subprocess.DEVNULL)
        try:
            started = RayNodes(network, 2, redis=f"{network.machine_address}:{PORT}")
            started.start()
            yield started
        finally:
            redis.terminate()
            redis.wait(20)


def test_the_store_is_killed_and_returns_and_nobody_notices(nodes: RayNodes) -> None:
    cluster = HostCluster(nodes, {"models": [dict(MODEL)]})
    with cluster.control:
        cluster.up()
        before = {row.replica for row in cluster.wait_ready("sim", 2)}
        answer = ask(cluster.router, "sim", [PROMPT], TOKENS)
        with Traffic(cluster.router, "sim", [PROMPT], TOKENS, streams=STREAMS) as traffic:
            for _ in range(2):
                (store,) = nodes.ray_pids(nodes.head, "gcs_server")
                asked = len(traffic.report.answers)
                os.kill(store, signal.SIGKILL)
                nodes.wait_for(nodes.head, "gcs_server", 10)
                deadline = time.monotonic() + SERVED_S
                while len(traffic.report.answers) < asked + 2 * STREAMS:  # some began while it was away
                    assert time.monotonic() < deadline, traffic.report
                    time.sleep(0.1)
            report = traffic.stop(60)
        assert all(got == answer[0] for got in report.answers)
        assert report.errors == []
        assert report.resumes == 0, "a stream moved"
        assert report.longest_gap_s < PAUSE_S
        assert {row.replica for row in cluster.wait_ready("sim", 2)} == before, "a replica was lost"
        cluster.apply(lambda spec: spec["models"][0].update(replicas=3))  # the store takes orders again
        cluster.wait_ready("sim", 3, SERVED_S)
        cluster.down()
