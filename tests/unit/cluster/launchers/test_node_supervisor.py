"""The node supervisor against a stand-in for Ray: it starts, tells when it is up, and leaves no process behind."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatoken.cluster.launchers.load import launch_of
from megatoken.cluster.launchers.node.environment import host_digest, with_label
from megatoken.cluster.ray.inventory import inventory_of
from megatoken.process.tree import descendants

NODE = [sys.executable, "-m", "megatoken.cluster.launchers.node"]
# Starts a daemon that leaves its session and parent, as Ray's processes may; says the word; waits for its end.
RAY = """
import subprocess, sys, time
daemon = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], start_new_session=True)
open(sys.argv[1], "w").write(str(daemon.pid))
print("Ray runtime started.", flush=True)
time.sleep(300)
"""
# Leaves a process behind, whose parent is gone and which ends soon.
LEAVES_ONE = """
import subprocess, sys, time
subprocess.run(["sh", "-c", f"sleep 0.3 >/dev/null 2>&1 & echo $! >{sys.argv[1]}"])
print("Ray runtime started.", flush=True)
time.sleep(300)
"""
FAILS = "import sys; print('ERROR: no memory left'); sys.exit(7)"


def node(
    action: str, directory: Path, *command: str, options: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    words = [*NODE, action, "--directory", str(directory), *options]
    words += ["--address", "127.0.0.1", "--", *command] if command else []
    return subprocess.run(words, capture_output=True, text=True, timeout=90, check=False)


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.05)


def test_start_tells_when_ray_runs_and_stop_leaves_nothing(tmp_path: Path) -> None:
    directory, daemon = tmp_path / "node", tmp_path / "daemon"
    began = node("start", directory, sys.executable, "-c", RAY, str(daemon))
    try:
        assert began.returncode == 0, began.stderr
        pid = int(daemon.read_text())
        supervisor = int((directory / "node.pid").read_text())
        assert pid in descendants(supervisor)
        again = node("start", directory, sys.executable, "-c", RAY, str(daemon))
        assert again.returncode == 3
        assert "runs already; stop it first" in again.stderr
        assert int(daemon.read_text()) == pid, "the second start touched the first"
    finally:
        stopped = node("stop", directory)
    assert stopped.returncode == 0, stopped.stderr
    assert not lives(pid)
    assert not lives(supervisor)
    assert not (directory / "ready").exists()
    assert node("stop", directory).returncode == 0, "stopping twice is fine"


def test_a_ray_that_does_not_start_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    failed = node("start", tmp_path / "node", sys.executable, "-c", FAILS)
    assert failed.returncode == 7
    assert failed.stderr.strip() == "megatoken node: Ray did not start: ERROR: no memory left"
    assert not (tmp_path / "node" / "node.pid").exists()


def test_a_ray_that_ends_is_started_again_and_nothing_of_the_old_one_is_left(tmp_path: Path) -> None:
    directory, daemon = tmp_path / "node", tmp_path / "daemon"
    assert node("start", directory, sys.executable, "-c", RAY, str(daemon)).returncode == 0
    try:
        first, supervisor = int(daemon.read_text()), int((directory / "node.pid").read_text())
        (ray,) = [pid for pid in descendants(supervisor) if pid != first]
        os.kill(ray, signal.SIGKILL)
        wait_until(lambda: daemon.read_text() not in ("", str(first)))
        wait_until((directory / "ready").exists)
        assert not lives(first)
        assert "Ray ended with status -9; started again in 1 s" in (directory / "node.log").read_text()
    finally:
        assert node("stop", directory).returncode == 0
    assert not lives(int(daemon.read_text()))
    assert not lives(supervisor)


def test_a_nodes_ray_carries_the_same_label_each_time() -> None:
    here = Path("/home/mt")
    assert host_digest("10.0.0.1", here) == host_digest("10.0.0.1", here)
    others = {host_digest("10.0.0.2", here), host_digest("10.0.0.1", Path("/home/other"))}
    assert host_digest("10.0.0.1", here) not in others
    command = ["ray", "start", "--block"]
    assert with_label(command, "megatoken-host", "abc") == [*command, "--labels=megatoken-host=abc"]
    labelled = ["ray", "start", "--labels=rack=r1", "--block"]
    assert with_label(labelled, "megatoken-host", "abc") == [*command, "--labels=rack=r1,megatoken-host=abc"]


def test_the_heads_ray_is_not_started_again(tmp_path: Path) -> None:
    directory, daemon = tmp_path / "node", tmp_path / "daemon"
    assert node("start", directory, sys.executable, "-c", RAY, str(daemon), "--head").returncode == 0
    first, supervisor = int(daemon.read_text()), int((directory / "node.pid").read_text())
    (ray,) = [pid for pid in descendants(supervisor) if pid != first]
    os.kill(ray, signal.SIGKILL)
    wait_until(lambda: not lives(supervisor))
    assert not lives(first)


def test_what_is_adopted_is_collected_when_it_ends(tmp_path: Path) -> None:
    """A process that ended and that nobody waits for would look alive to whoever asks for it."""
    directory, orphan = tmp_path / "node", tmp_path / "orphan"
    assert node("start", directory, sys.executable, "-c", LEAVES_ONE, str(orphan)).returncode == 0
    try:
        wait_until(lambda: orphan.exists() and orphan.read_text() != "")
        wait_until(lambda: not Path(f"/proc/{orphan.read_text().strip()}").exists())
    finally:
        assert node("stop", directory).returncode == 0


def test_a_command_that_fails_once_ray_runs_takes_ray_down(tmp_path: Path) -> None:
    daemon = tmp_path / "daemon"
    failed = node("start", tmp_path / "node", sys.executable, "-c", RAY, str(daemon), options=("--then", "false"))
    assert failed.returncode == 1
    assert "failed once Ray ran: false" in failed.stderr
    wait_until(lambda: not lives(int(daemon.read_text())))


def test_an_address_of_another_machine_is_refused(tmp_path: Path) -> None:
    words = [*NODE, "run", "--directory", str(tmp_path), "--address", "203.0.113.9", "--", "true"]
    refused = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert refused.returncode == 2
    assert "address: '203.0.113.9' is not allowed; this machine has:" in refused.stderr


def test_ray_gets_the_nodes_environment_and_as_many_open_files_as_there_may_be(tmp_path: Path) -> None:
    command = ["sh", "-c", 'env; echo "$0"; ulimit -Sn']
    words = [*NODE, "run", "--directory", str(tmp_path), "--address", "127.0.0.1", "--", *command]
    clean = {name: value for name, value in os.environ.items() if not name.endswith("_IFNAME")}
    shown = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True, env=clean).stdout
    assert shown.splitlines()[-1] == str(resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    assert "VLLM_HOST_IP=127.0.0.1\n" in shown
    assert f"--labels=megatoken-host={host_digest('127.0.0.1', tmp_path)}\n" in shown
    assert "GLOO_SOCKET_IFNAME=lo\n" in shown


@pytest.mark.parametrize("domains", [[4, 4], []])
def test_what_a_host_is_launched_with_is_what_the_inventory_reads(domains: list[int]) -> None:
    host = {"host": "a", "gpus": 8, "device_kind": "mi355x", "device_memory_gib": 288, "rack": "r1", "site": "paris"}
    launch = launch_of({"ssh": {"hosts": [{**host, "link_domains": domains}]}})
    assert launch.ssh is not None
    entry = {"NodeID": "ab", "Alive": True, "NodeManagerAddress": "10.0.0.1", "Resources": {"GPU": 8.0}}
    (read,) = inventory_of([{**entry, "Labels": launch.ssh.hosts[0].node_labels}]).nodes
    assert (read.site, read.rack) == ("paris", "r1")
    assert {device.kind for device in read.devices} == {"mi355x"}
    assert {device.memory_bytes for device in read.devices} == {288 << 30}
    assert [device.link_domain for device in read.devices] == (["0"] * 4 + ["1"] * 4 if domains else [""] * 8)
