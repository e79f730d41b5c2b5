"""Launching as a Slurm job for real: Debian's Slurm on two hosts; submitted, followed, served, and ended."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.netns import hosts
from deploy.netns.hosts import Network
from megatoken.cluster.client.control import client_of
from megatoken.cluster.client.records import read_records
from tests.netns.slurm import MISSING, SlurmHosts

pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"Slurm is not installed here: no {MISSING}"),
    pytest.mark.timeout(400),
]
UP_S = 200.0
ENDED_S = 60.0


@pytest.fixture(scope="module")
def slurm() -> Iterator[SlurmHosts]:
    if reason := hosts.missing_requirement():
        pytest.skip(reason)
    with Network.create(2) as network, SlurmHosts(network) as started:
        yield started


class Operator:
    """Somebody who runs `megatoken` on this machine, which is none of the job's."""

    def __init__(self, slurm: SlurmHosts) -> None:
        self.slurm = slurm
        self.states = slurm.directory / "operator"
        self.environment = {**slurm.environment, "MEGATOKEN_STATE_DIR": str(self.states)}

    def spec(self, **slurm: Any) -> str:
        path = self.slurm.work / "spec.yaml"
        launch = {"nodes": 2, "cpu_devices": 1, "prefix": sys.prefix, "wait_s": 90, **slurm}
        replicas = min(launch["nodes"], 2)
        model = {"name": "m", "engine": "simulated", "replicas": replicas, "placement": {"separate": "node"}}
        services = {"routers": {"count": 1}, "edge": {"count": 0}, "agents": {"enabled": False}}
        path.write_text(yaml.safe_dump({"cluster": "lab", "launch": {"slurm": launch}, "models": [model], **services}))
        return str(path)

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "megatoken.cluster.cli", *words],
            env=self.environment,
            cwd=self.slurm.work,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *words: str, status: int = 0, timeout_s: float = UP_S) -> str:
        process = self.start(*words)
        said, _ = process.communicate(timeout=timeout_s)
        assert process.returncode == status, said
        return said


@pytest.fixture
def operator(slurm: SlurmHosts) -> Iterator[Operator]:
    yield Operator(slurm)
    slurm.run("scancel", "--user=root")
    wait(lambda: not slurm.jobs())


def wait(met: Callable[[], bool], timeout_s: float = ENDED_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not met():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def left(slurm: SlurmHosts) -> list[str]:
    """What runs on a host beside Slurm itself."""
    found = [command for host in slurm.network.hosts for command in host.processes().values()]
    return [text for text in found if not re.match(r"(\S*: )?slurm\w*d\b", text)]


def test_up_submits_follows_and_serves_also_after_a_nodes_ray_ended_and_down_ends_the_job(operator: Operator) -> None:
    slurm = operator.slurm
    said = operator.run("up", "-f", operator.spec(), "--timeout", "150")
    assert "PENDING" in said or "RUNNING" in said
    assert said.count("READY") >= 2
    (record,) = read_records(operator.states)
    assert f"{record.slurm_job} RUNNING" in slurm.jobs()
    with client_of(record) as client:
        before = {row.replica: row.node for row in client.status().replicas if row.state == "READY"}
        assert len(set(before.values())) == 2
        slurm.network.hosts[1].run(["pkill", "-9", "raylet"])
        wait(lambda: any(row.state == "FAILED" for row in client.status().replicas), 30)
        wait(lambda: [row.state for row in client.status().replicas if row.state != "FAILED"] == ["READY", "READY"], 90)
        after = {row.replica for row in client.status().replicas if row.state == "READY"}
    assert len(set(before) & after) == 1, "the replica of the other node served on"
    assert "it is up already" in operator.run("up", "-f", operator.spec(), status=2)
    operator.run("down", "--drain", "5")
    assert slurm.jobs() == ""
    assert left(slurm) == []
    assert list(operator.states.iterdir()) == []
    assert not list((slurm.directory / "home").rglob("ray_token")), "the job's token outlives it"


def test_a_job_that_slurm_asks_to_end_drains_and_leaves_nothing(operator: Operator) -> None:
    slurm = operator.slurm
    operator.run("up", "-f", operator.spec(nodes=1), "--timeout", "150")
    (record,) = read_records(operator.states)
    slurm.run("scancel", "--batch", "--signal=TERM", str(record.slurm_job))
    wait(lambda: not slurm.jobs())
    assert left(slurm) == []


def test_ctrl_c_in_the_queue_cancels_and_a_refusal_is_one_clear_error(operator: Operator) -> None:
    slurm = operator.slurm
    said = operator.run("up", "-f", operator.spec(partition="nowhere"), status=1)
    assert "sbatch: error: invalid partition specified: nowhere" in said
    assert "Traceback" not in said
    process = operator.start("up", "-f", operator.spec(nodes=3))  # more than there are: it waits for ever
    try:
        wait(lambda: "PENDING" in slurm.jobs())
        time.sleep(1.5)  # so that it has looked
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "PENDING (Partition" in said
    assert slurm.jobs() == ""
    assert not Path(operator.states / "lab.json").exists()


def test_a_job_that_fails_shows_the_end_of_its_log(operator: Operator) -> None:
    said = operator.run("up", "-f", operator.spec(setup=["echo no such module >&2", "exit 3"]), status=1)
    assert "ended before the cluster was up: FAILED, exit code 3:0" in said
    assert "no such module" in said
