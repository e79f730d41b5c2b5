"""Nothing outlives its owner: a local cluster, whichever of its processes is killed, leaves no process and no file."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.clusters import RunningCluster

SPEC = {
    "cluster": "ends",
    "control": {"port": 0},
    "routers": {"port": 0},
    "edge": {"count": 0},
    "models": [{"name": "sim", "engine": "simulated", "replicas": 1}],
}


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[RunningCluster]:
    started = RunningCluster(tmp_path, SPEC)
    yield started
    started.kill_all()  # of a test that failed halfway


def nothing_remains(cluster: RunningCluster) -> None:
    cluster.wait_nothing_left(30.0)
    assert not list((cluster.directory / "run").iterdir())
    assert not list((cluster.directory / "state").iterdir())


def test_ctrl_c_of_up_takes_everything_down(cluster: RunningCluster) -> None:
    command = cluster.foreground()
    assert command.stdout is not None
    lines = []
    for line in command.stdout:
        lines.append(line)
        if "Ctrl-C takes it down" in line:
            break
    assert any("sim-1: STARTING -> READY" in line for line in lines), lines
    command.send_signal(signal.SIGINT)
    rest, _ = command.communicate(timeout=60)
    assert command.returncode == 0, rest
    assert "READY -> DRAINING" in rest
    nothing_remains(cluster)


def test_the_kill_of_up_takes_everything_down(cluster: RunningCluster) -> None:
    command = cluster.foreground()
    assert command.stdout is not None
    next(line for line in command.stdout if "controller serves" in line)
    command.kill()
    command.wait()
    nothing_remains(cluster)


@pytest.mark.parametrize("victim", ["cluster.start.guard", "cluster.start.owner"])
def test_the_kill_of_a_detached_clusters_owner_takes_everything_down(cluster: RunningCluster, victim: str) -> None:
    cluster.up()
    own = [
        pid
        for pid in cluster.pids(victim)
        if (cluster.parent(pid) in cluster.pids("cluster.start.guard")) == (victim == "cluster.start.owner")
    ]
    assert len(own) == 1
    os.kill(own[0], signal.SIGKILL)
    cluster.wait_nothing_left(30.0)
    if victim == "cluster.start.owner":
        nothing_remains(cluster)
    else:  # whoever is left cannot clear the record; the next command says so and the next `up` works
        assert "no cluster is running" in cluster.run("status", status=1)


def test_a_name_in_use_and_a_port_in_use_disturb_nothing(cluster: RunningCluster) -> None:
    cluster.up()
    before = sorted(cluster.pids("-m", "megatoken.router"))
    again = cluster.run("up", "-f", str(cluster.spec_file), "--detach", status=2)
    assert "a cluster of that name runs" in again
    port = cluster.address("router").rpartition(":")[2]
    other = cluster.directory / "other.yaml"
    other.write_text(f"cluster: other\nrouters: {{port: {port}}}\nedge: {{count: 0}}\n")
    assert f"routers.port: {port} is not allowed; it is in use on 127.0.0.1" in cluster.run(
        "up", "-f", str(other), status=2
    )
    assert sorted(cluster.pids("-m", "megatoken.router")) == before
    cluster.down()
    nothing_remains(cluster)


def test_a_command_without_a_cluster_says_how_to_start_one(cluster: RunningCluster) -> None:
    assert "start one with `megatoken up`" in cluster.run("status", status=1)
