"""The supervisor of a head whose control store may end: the store comes back alone, the raylet's end is the head's."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatoken.cluster.launchers.load import launch_of
from megatoken.cluster.launchers.node.store import NAMESPACE, namespaced
from megatoken.cluster.launchers.slurm.job import job_script
from megatoken.cluster.launchers.ssh.steps import ssh_plan
from megatoken.cluster.spec.load import parse_spec
from megatoken.process.tree import descendants

NODE = [sys.executable, "-m", "megatoken.cluster.launchers.node"]
# As `ray start` without --block: it starts a raylet and a store that outlive it, says the word and ends.
RAY = """
import subprocess, sys
for name in ("raylet", "gcs_server"):
    subprocess.Popen([f"{sys.argv[1]}/{name}", "300"], start_new_session=True, stdout=subprocess.DEVNULL)
print("Ray runtime started.", flush=True)
"""


class Head:
    """A supervised head of stand-ins, `sleep` under the names of Ray's programs."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        for name in ("raylet", "gcs_server"):
            shutil.copy("/bin/sleep", directory / name)
        self.run("start", "--address", "127.0.0.1", "--", sys.executable, "-c", RAY, str(directory), "--head")

    def run(self, action: str, *words: str) -> None:
        env = {**os.environ, "RAY_REDIS_ADDRESS": "127.0.0.1:1", "RAY_AUTH_TOKEN": "7" * 64}
        argv = [*NODE, action, "--directory", str(self.directory / "node"), *words]
        subprocess.run(argv, env=env, check=True, timeout=60)

    def pid(self, name: str) -> int:
        """The living process of that name below the supervisor; 0: none."""
        supervisor = int((self.directory / "node" / "node.pid").read_text())
        for pid in descendants(supervisor):
            with contextlib.suppress(OSError):  # it ended meanwhile
                if Path(f"/proc/{pid}/comm").read_text().strip() == name:
                    return pid
        return 0

    def another(self, name: str, than: int) -> int:
        deadline = time.monotonic() + 30
        while (found := self.pid(name)) in (0, than):
            assert time.monotonic() < deadline, f"no other {name}"
            time.sleep(0.05)
        return found


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Head]:
    made = Head(tmp_path)
    yield made
    made.run("stop")


def test_a_store_that_ends_is_started_again_as_it_was(head: Head) -> None:
    raylet, store = head.pid("raylet"), head.pid("gcs_server")
    before = [Path(f"/proc/{store}/{name}").read_bytes() for name in ("cmdline", "environ")]
    for _ in range(2):
        os.kill(store, signal.SIGKILL)
        store = head.another("gcs_server", store)
        time.sleep(0.1)  # until it has become the program
        assert [Path(f"/proc/{store}/{name}").read_bytes() for name in ("cmdline", "environ")] == before
    assert head.pid("raylet") == raylet
    assert f"{NAMESPACE}=megatoken-".encode() in before[1]


def test_a_raylet_that_ends_takes_the_head_and_its_supervisor_along(head: Head) -> None:
    raylet, store = head.pid("raylet"), head.pid("gcs_server")
    supervisor = int((head.directory / "node" / "node.pid").read_text())
    os.kill(raylet, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in (supervisor, store)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_keys_of_another_token_are_another_clusters(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("a" * 64 + "\n")
    (one, same, other) = (
        namespaced(env)[NAMESPACE]
        for env in ({"RAY_AUTH_TOKEN_PATH": str(file)}, {"RAY_AUTH_TOKEN": "a" * 64}, {"RAY_AUTH_TOKEN": "b" * 64})
    )
    assert one == same != other
    assert namespaced({NAMESPACE: "mine", "RAY_AUTH_TOKEN": "a"})[NAMESPACE] == "mine"


@pytest.mark.parametrize("redis", [None, {"address": "10.0.0.9:6380"}])
def test_only_a_head_whose_store_may_end_is_started_without_block(redis: dict[str, str] | None) -> None:
    hosts = [{"host": "a"}, {"host": "b"}]
    launch = launch_of({"ssh": {"hosts": hosts}, "slurm": {"nodes": 2}, "redis": redis})
    spec = parse_spec({"models": [{"name": "m", "engine": "simulated"}]})
    plan = ssh_plan(spec, launch)
    assert ("--block" in plan.head.argv[-1]) is (redis is None)
    assert ("RAY_REDIS_ADDRESS=10.0.0.9:6380" in plan.head.argv[-1]) is (redis is not None)
    assert all("--block" in step.argv[-1] and "REDIS" not in step.argv[-1] for step in plan.others)
    job = job_script(spec, launch)
    head = next(line for line in job.splitlines() if line.startswith("nodes 0 1"))
    assert head.endswith("--block") is (redis is None)
    assert ("export RAY_REDIS_ADDRESS=10.0.0.9:6380\nnodes 0 1" in job) is (redis is not None)
