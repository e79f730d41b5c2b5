"""The hosts themselves: separate names, addresses, processes and files, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from deploy.netns import hosts
from deploy.netns.hosts import Network
from deploy.netns.ray_nodes import REPOSITORY

LISTEN = "import socket; s=socket.create_server(('0.0.0.0', 5000)); print('up', flush=True); s.accept(); s.accept()"


def reach(host: hosts.Host, target: str) -> bool:
    code = f"import socket; socket.create_connection(({target!r}, 5000), timeout=0.5)"
    return host.run([sys.executable, "-S", "-c", code], check=False).returncode == 0


def test_a_host_has_its_own_name_address_processes_and_files(make_network: Callable[[int], Network]) -> None:
    first, second = make_network(2).hosts
    assert first.run(["hostname"]).stdout.strip() == "node0"
    assert first.run(["hostname", "-i"]).stdout.strip() == first.address
    assert first.run(["getent", "hosts", "node1"]).stdout.split()[0] == second.address
    first.run(["sh", "-c", "echo secret > /tmp/file; echo secret > /dev/shm/file"])
    assert second.run(["sh", "-c", "ls /tmp /dev/shm | grep -c file"], check=False).stdout.strip() == "0"
    assert first.path("/tmp/file").read_text() == "secret\n"
    sleeper = first.popen(["sleep", "60"])
    deadline = time.monotonic() + 10
    while list(first.processes().values()) != ["sleep 60"]:  # until then it is the program that enters the host
        assert time.monotonic() < deadline, first.processes()
        time.sleep(0.01)
    assert second.processes() == {}
    first.power_off()
    assert sleeper.wait(5) != 0


def test_a_cut_link_partitions_and_heals(make_network: Callable[[int], Network]) -> None:
    first, second = make_network(2).hosts
    server = second.popen([sys.executable, "-S", "-c", LISTEN], stdout=subprocess.PIPE)
    assert server.stdout is not None
    server.stdout.readline()
    assert reach(first, second.address)
    second.link(up=False)
    assert not reach(first, second.address)
    second.link(up=True)
    assert reach(first, "node1")
    second.power_off()
    server.wait(5)
    server.stdout.close()


def test_nothing_is_left_behind(make_network: Callable[[int], Network]) -> None:
    network = make_network(2)
    network.hosts[0].popen(["sleep", "60"])
    network.hosts[1].popen(["setsid", "sleep", "60"])  # a daemon of its own session dies as well
    while not (network.hosts[0].processes() and network.hosts[1].processes()):
        time.sleep(0.01)
    pids = [pid for host in network.hosts for pid in host.processes()]
    network.destroy()
    network.destroy()
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    assert network.name not in hosts.ip("netns", "list")
    assert network.name not in hosts.ip("-o", "link")
    assert not network.directory.exists()


def test_a_killed_owner_takes_its_hosts_along_and_the_rest_is_swept() -> None:
    code = (
        "from deploy.netns.hosts import Network; import time; n=Network.create(1, name='mtkilled');"
        "n.hosts[0].popen(['sleep','60']); print(n.hosts[0].init_pid, flush=True); time.sleep(60)"
    )
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=REPOSITORY)
    assert owner.stdout is not None
    init = int(owner.stdout.readline())
    os.kill(owner.pid, signal.SIGKILL)
    owner.wait()
    owner.stdout.close()
    deadline = time.monotonic() + 5
    while Path(f"/proc/{init}").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not Path(f"/proc/{init}").exists()
    hosts.remove_abandoned()
    assert "mtkilled" not in hosts.names()
    assert "mtkilled" not in hosts.ip("netns", "list") + hosts.ip("-o", "link")


@pytest.mark.parametrize(("count", "name", "message"), [(0, "mtx", "hosts: 0"), (1, "no-dash", "'no-dash'")])
def test_a_wrong_request_says_what_is_allowed(count: int, name: str, message: str) -> None:
    with pytest.raises(hosts.NetworkError, match=message):
        Network.create(count, name=name)
