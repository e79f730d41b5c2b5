"""Launching over ssh for real: an sshd on each of two hosts, host keys checked, and nothing left behind."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from deploy.netns.hosts import Network
from megatoken.cluster.cli.__main__ import main
from megatoken.cluster.launchers.load import launch_of
from megatoken.cluster.launchers.ssh.run import LaunchError, SshCluster
from megatoken.cluster.launchers.ssh.script import ssh_artefacts
from megatoken.cluster.spec.cluster import ClusterSpec
from megatoken.cluster.spec.load import dump_spec, parse_spec
from tests.netns.sshd import MISSING, PACKAGES, PORT, STATE_DIR, keygen, public, start_sshd

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)
PREFIX = Path(sys.prefix)
TOKEN = "7" * 64
LISTENER = """
import socket, sys
listener = socket.create_server(("", 7700))
print("ready", flush=True)
sys.stdin.read()
"""
LOGIN = {"PATH": "/usr/bin:/bin", "HOME": str(Path.home()), "MEGATOKEN_STATE_DIR": STATE_DIR}  # as sshd gives it


@dataclass
class SshHosts:
    """Hosts that run sshd, and what a client needs to reach them."""

    network: Network
    directory: Path

    def spec(self, *, known_hosts: str = "known_hosts", addresses: dict[str, str] | None = None) -> ClusterSpec:
        hosts = [
            {
                "host": host.address,
                "address": (addresses or {}).get(host.name, host.address),
                "cpu_devices": 1,
                "rack": host.name,
                "link_domains": [1],
            }
            for host in self.network.hosts
        ]
        ssh = {
            "hosts": hosts,
            "user": "root",
            "port": PORT,
            "identity_file": str(self.directory / "client"),
            "known_hosts_file": str(self.directory / known_hosts),
            "connect_timeout_s": 5,
            "start_timeout_s": 150,
            "prefix": str(PREFIX),
            "directory": "/tmp/mt",
        }
        services = {"routers": {"count": 1}, "edge": {"count": 0}, "agents": {"enabled": False}}
        model = {"name": "m", "engine": "simulated", "replicas": 2, "placement": {"separate": "node"}}
        return parse_spec({"cluster": "sshtest", "launch": {"ssh": ssh}, "models": [model], **services})

    def cluster(self, spec: ClusterSpec) -> SshCluster:
        return SshCluster(spec, launch_of(spec.launch), TOKEN, lambda _line: None)

    def left(self) -> list[str]:
        """Processes of ours on any host."""
        found = [command for host in self.network.hosts for command in host.processes().values()]
        return [command for command in found if "ray" in command or "cluster." in command or "worker" in command]


@pytest.fixture
def ssh_hosts(make_network: Callable[[int], Network], tmp_path: Path) -> SshHosts:
    network = make_network(2)
    keygen("client", tmp_path)
    keygen("stranger", tmp_path)
    known, wrong = [], []
    for host in network.hosts:
        keygen(host.name, tmp_path)
        start_sshd(host, tmp_path)
        known.append(f"[{host.address}]:{PORT} {public(tmp_path / host.name)}")
        wrong.append(f"[{host.address}]:{PORT} {public(tmp_path / ('stranger' if wrong else host.name))}")
    (tmp_path / "known_hosts").write_text("\n".join(known) + "\n")
    (tmp_path / "wrong_key").write_text("\n".join(wrong) + "\n")
    (tmp_path / "unknown_key").write_text(known[0] + "\n")
    return SshHosts(network, tmp_path)


def wait_until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.1)


def test_a_host_that_cannot_be_used_is_one_clear_error_and_nothing_starts(ssh_hosts: SshHosts) -> None:
    second = ssh_hosts.network.hosts[1]
    for known_hosts, said in (
        ("wrong_key", "its host key is not the known one"),
        ("unknown_key", "its host key is not known"),
    ):
        with pytest.raises(LaunchError) as caught:
            ssh_hosts.cluster(ssh_hosts.spec(known_hosts=known_hosts)).check()
        assert str(caught.value).startswith(f"host {second.address}: {said}")
    second.link(up=False)
    with pytest.raises(LaunchError, match=rf"host {second.address}: it is unreachable"):
        ssh_hosts.cluster(ssh_hosts.spec()).check()
    assert ssh_hosts.left() == []


def test_a_host_that_cannot_start_takes_down_what_started(ssh_hosts: SshHosts) -> None:
    second = ssh_hosts.network.hosts[1]
    spec = ssh_hosts.spec(addresses={second.name: "203.0.113.9"})
    with pytest.raises(LaunchError) as caught:
        ssh_hosts.cluster(spec).up(controller=False)
    assert f"host {second.address}: could not start Ray" in str(caught.value)
    assert "address: '203.0.113.9' is not allowed; this machine has: eth0" in str(caught.value)
    assert ssh_hosts.left() == [], "the head was started and must be gone"


def test_up_examines_every_host_before_it_starts_anything(
    ssh_hosts: SshHosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MEGATOKEN_STATE_DIR", str(tmp_path / "state"))
    spec = tmp_path / "spec.yaml"
    spec.write_text(dump_spec(ssh_hosts.spec()))
    head, second = ssh_hosts.network.hosts
    other = second.path(f"{PACKAGES}/ray-2.59.0.dist-info")
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: ray\nVersion: 2.59.0\n")
    holder = head.popen([sys.executable, "-c", LISTENER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"ready\n"
        assert main(["up", "-f", str(spec)]) == 1
    finally:
        holder.communicate(timeout=20)  # its stdin ends, and it does too
    said = capsys.readouterr().err
    assert f"{second.name} ({second.address}) 2.59.0: ray differs from" in said
    assert f"{head.name} ({head.address}): port 7700 is in use" in said
    assert "--no-doctor" in said
    assert ssh_hosts.left() == []


def test_the_rendered_scripts_bring_a_whole_cluster_up_and_down(ssh_hosts: SshHosts, tmp_path: Path) -> None:
    spec = ssh_hosts.spec()
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    for artefact in ssh_artefacts(spec, launch_of(spec.launch)):
        (scripts / artefact.name).write_text(artefact.text)
        if artefact.executable:
            (scripts / artefact.name).chmod(0o755)
    head = ssh_hosts.network.hosts[0]
    try:
        up = subprocess.run([scripts / "up.sh"], capture_output=True, text=True, timeout=280, check=False)
        assert up.returncode == 0, up.stdout + up.stderr
        assert (scripts / "ray_token").stat().st_mode & 0o777 == 0o600
        status = [str(PREFIX / "bin" / "megatoken"), "status", "--cluster", "sshtest"]

        def both_ready() -> bool:
            shown = head.run(status, LOGIN, check=False).stdout
            return shown.count("READY") >= 2

        wait_until(both_ready, 150)
    finally:
        down = subprocess.run([scripts / "down.sh"], capture_output=True, text=True, timeout=280, check=False)
    assert down.returncode == 0, down.stdout + down.stderr
    assert ssh_hosts.left() == []
