"""Hosts on one machine: network namespaces with their own address, name, processes, /tmp and /dev/shm.

A `Network` is a bridge with a /24 of its own and hosts joined to it by veth pairs. Each host is a network namespace
plus PID, mount, UTS and IPC namespaces whose first process is init.py, so that
- names resolve as on real machines: the host's name to its address, never to loopback;
- cutting its power (`Host.power_off`) ends all its processes at once, and cutting its link (`Host.link`) partitions it;
- taking the network down leaves no process, namespace, interface or file.
The machine itself reaches every host by address, over the bridge. Needs root, iproute2 and util-linux.

Who calls it: ray_nodes.py, the command line (`python -m deploy.netns`), and tests.
"""

from __future__ import annotations

import ctypes
import ipaddress
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STATE_ROOT = Path("/run/megatoken-netns")  # one directory per network: state.json and a directory per host
HOST_LIMIT = 64
BOOT_TIMEOUT_S = 10.0
POWER_OFF_TIMEOUT_S = 60.0  # the kernel frees the memory of every process first, and the machine may be busy
COMMAND_TIMEOUT_S = 60.0
INIT = Path(__file__).with_name("init.py")


class NetworkError(RuntimeError):
    """A network or host could not be made, found, or taken down."""


def missing_requirement() -> str | None:
    """Why hosts cannot be made here, or None when they can."""
    if not sys.platform.startswith("linux"):
        return "network namespaces need Linux"
    if os.geteuid() != 0:
        return "network namespaces need root"
    tools = [tool for tool in ("ip", "nsenter", "unshare", "mount") if shutil.which(tool) is None]
    if tools:
        return f"not installed: {', '.join(tools)} (packages iproute2 and util-linux)"
    probe = f"mtprobe{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S)
    if made.returncode:
        return f"the kernel refuses network namespaces: {made.stderr.strip()}"
    ip("netns", "del", probe)
    return None


def ip(*arguments: str) -> str:
    """Runs the `ip` tool; raises NetworkError with its own words."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S)
    if done.returncode:
        raise NetworkError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG


@dataclass
class Host:
    """One host. `init_pid` is its first process as this machine sees it, or None while its power is off."""

    network: str
    index: int
    name: str
    address: str
    directory: Path
    init_pid: int | None = None
    _holder: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def namespace(self) -> str:
        return f"{self.network}-{self.name}"

    @property
    def outer_link(self) -> str:
        return f"{self.network}v{self.index}"

    def path(self, inside: str) -> Path:
        """Where a file under the host's /tmp lies on this machine."""
        relative = Path(inside).relative_to("/tmp")
        return self.directory / "tmp" / relative

    def command(self, argv: Sequence[str]) -> list[str]:
        """The command line that runs `argv` inside the host."""
        if self.init_pid is None:
            raise NetworkError(f"host {self.name}: its power is off")
        return ["nsenter", "--target", str(self.init_pid), "--net", "--mount", "--uts", "--ipc", "--pid", "--", *argv]

    def popen(self, argv: Sequence[str], env: Mapping[str, str] | None = None, **options: Any) -> subprocess.Popen[Any]:
        """Starts `argv` in the host. The returned process is the way in; killing the host ends what runs."""
        return subprocess.Popen(self.command(argv), env=None if env is None else dict(env), **options)

    def run(
        self, argv: Sequence[str], env: Mapping[str, str] | None = None, timeout_s: float = 60.0, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Runs `argv` in the host to its end; raises NetworkError with its output when it fails and `check` is set."""
        done = subprocess.run(
            self.command(argv),
            env=None if env is None else dict(env),
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        if check and done.returncode:
            raise NetworkError(f"{self.name}: {' '.join(argv)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def processes(self) -> dict[int, str]:
        """The host's processes but its first: PID on this machine -> command line. Zombies are left out."""
        if self.init_pid is None:
            return {}
        namespace = os.readlink(f"/proc/{self.init_pid}/ns/pid")
        found: dict[int, str] = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == self.init_pid:
                continue
            try:
                if os.readlink(entry / "ns" / "pid") == namespace:
                    text = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                    if text:
                        found[int(entry.name)] = text
            except OSError:  # it ended while we looked
                continue
        return found

    def link(self, up: bool) -> None:
        """Plugs the host's network cable in or pulls it out."""
        ip("link", "set", self.outer_link, "up" if up else "down")

    def power_on(self, owned: bool) -> None:
        """Boots the host with an empty /tmp. An owned host dies with the calling thread."""
        if self.init_pid is not None:
            raise NetworkError(f"host {self.name}: its power is on already")
        shutil.rmtree(self.directory / "tmp", ignore_errors=True)
        (self.directory / "tmp").mkdir(mode=0o1777, parents=True)
        (self.directory / "tmp").chmod(0o1777)
        reader, writer = os.pipe()
        inside = [sys.executable, "-I", "-S", str(INIT), str(self.directory), self.name, str(writer)]
        unshare = ["unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child=KILL", "--", *inside]
        self._holder = subprocess.Popen(
            ["ip", "netns", "exec", self.namespace, *unshare],
            pass_fds=[writer],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=(self.directory / "init.log").open("wb"),
            start_new_session=True,
            preexec_fn=_die_with_parent if owned else None,
        )
        os.close(writer)
        with os.fdopen(reader) as ready:
            if ready.readline() != "ready\n":
                raise NetworkError(
                    f"host {self.name} did not boot: {(self.directory / 'init.log').read_text().strip()}"
                )
        children = Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children").read_text().split()
        self.init_pid = int(children[0])

    def power_off(self) -> None:
        """Ends every process of the host at once. Its address and namespace stay, so it can be booted again."""
        if self.init_pid is None:
            return
        for pid in (self.init_pid, self._holder.pid if self._holder else None):
            if pid is not None:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
        if self._holder is not None:
            self._holder.wait(timeout=POWER_OFF_TIMEOUT_S)
        deadline = time.monotonic() + POWER_OFF_TIMEOUT_S
        while Path(f"/proc/{self.init_pid}").exists():  # the kernel ends the whole PID namespace first
            if time.monotonic() > deadline:
                raise NetworkError(f"host {self.name}: processes still run {POWER_OFF_TIMEOUT_S} s after the power cut")
            time.sleep(0.01)
        self.init_pid, self._holder = None, None


class Network:
    """A bridge and its hosts. Make one with `create` (or find one with `load`), and end it with `destroy`."""

    def __init__(self, name: str, subnet: ipaddress.IPv4Network, owner_pid: int, hosts: list[Host]) -> None:
        self.name = name
        self.subnet = subnet
        self.owner_pid = owner_pid
        self.hosts = hosts
        self.directory = STATE_ROOT / name

    @property
    def bridge(self) -> str:
        return f"{self.name}br"

    @property
    def machine_address(self) -> str:
        """The machine's own address on the bridge."""
        return str(self.subnet[254])

    @classmethod
    def create(cls, host_count: int, name: str | None = None, owned: bool = True, host_names: str = "node") -> Network:
        """Makes a network of booted hosts node0, node1, ...; an owned one dies with the calling thread.

        Raises NetworkError, with everything undone, when a step fails.
        """
        if not 1 <= host_count <= HOST_LIMIT:
            raise NetworkError(f"hosts: {host_count} is not allowed; 1 to {HOST_LIMIT}")
        remove_abandoned()
        name = name or f"mt{os.urandom(2).hex()}"
        if not (name.isalnum() and len(name) <= 8):  # interface names have at most 15 characters
            raise NetworkError(f"name: {name!r} is not allowed; up to 8 letters and digits")
        if (STATE_ROOT / name).exists():
            raise NetworkError(f"network {name} exists already; take it down first")
        network = cls(name, free_subnet(), os.getpid() if owned else 0, [])
        for index in range(host_count):
            host_name = f"{host_names}{index}"
            address = str(network.subnet[index + 1])
            network.hosts.append(Host(name, index, host_name, address, network.directory / host_name))
        try:
            network._build(owned)
        except BaseException:
            network.destroy()
            raise
        return network

    @classmethod
    def load(cls, name: str) -> Network:
        """Finds a network made by another process."""
        try:
            state = json.loads((STATE_ROOT / name / "state.json").read_text())
        except FileNotFoundError:
            raise NetworkError(f"no network {name}; there are: {', '.join(names()) or 'none'}") from None
        hosts = [
            Host(name, index, entry["name"], entry["address"], STATE_ROOT / name / entry["name"], entry["init_pid"])
            for index, entry in enumerate(state["hosts"])
        ]
        return cls(name, ipaddress.IPv4Network(state["subnet"]), state["owner_pid"], hosts)

    def host(self, name: str) -> Host:
        for host in self.hosts:
            if host.name == name:
                return host
        raise NetworkError(f"no host {name}; there are: {', '.join(host.name for host in self.hosts)}")

    def _build(self, owned: bool) -> None:
        self.directory.mkdir(parents=True, mode=0o700)
        self.save()
        ip("link", "add", self.bridge, "type", "bridge")
        ip("addr", "add", f"{self.machine_address}/24", "dev", self.bridge)
        ip("link", "set", self.bridge, "up")
        table = "".join(f"{host.address} {host.name}\n" for host in self.hosts)
        for host in self.hosts:
            host.directory.mkdir()
            (host.directory / "hosts").write_text(f"127.0.0.1 localhost\n{table}{self.machine_address} machine\n")
            (host.directory / "resolv.conf").write_text("")  # no name server: unknown names fail at once
            self._join(host)
            host.power_on(owned)
        self.save()

    def _join(self, host: Host) -> None:
        inner = f"{self.name}i{host.index}"
        ip("netns", "add", host.namespace)
        ip("link", "add", host.outer_link, "type", "veth", "peer", "name", inner)
        ip("link", "set", host.outer_link, "master", self.bridge, "up")
        ip("link", "set", inner, "netns", host.namespace, "name", "eth0")
        ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
        ip("-n", host.namespace, "link", "set", "eth0", "up")
        ip("-n", host.namespace, "link", "set", "lo", "up")
        ip("-n", host.namespace, "route", "add", "default", "via", self.machine_address)

    def save(self) -> None:
        """Writes what `load` reads; call it after a host was booted again."""
        state = {
            "subnet": str(self.subnet),
            "owner_pid": self.owner_pid,
            "hosts": [{"name": host.name, "address": host.address, "init_pid": host.init_pid} for host in self.hosts],
        }
        (self.directory / "state.json").write_text(json.dumps(state))

    def destroy(self) -> None:
        """Ends every process and removes every namespace, interface and file. May be called twice."""
        for host in self.hosts:
            host.power_off()
        present = ip("-o", "link").split()
        for link in [*(host.outer_link for host in self.hosts), self.bridge]:
            if any(word.split("@")[0].rstrip(":") == link for word in present):
                ip("link", "del", link)
        namespaces = ip("netns", "list").split()
        for host in self.hosts:
            if host.namespace in namespaces:
                ip("netns", "del", host.namespace)
        shutil.rmtree(self.directory, ignore_errors=True)
        if STATE_ROOT.exists() and not any(STATE_ROOT.iterdir()):
            STATE_ROOT.rmdir()

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *exception: object) -> None:
        self.destroy()


def names() -> list[str]:
    """The networks on this machine."""
    return sorted(entry.parent.name for entry in STATE_ROOT.glob("*/state.json"))


def free_subnet() -> ipaddress.IPv4Network:
    """A /24 within 10.64.0.0/10 that no route of this machine covers; drawn, so that parallel runs differ."""
    taken = []
    for line in ip("-4", "-o", "route").splitlines():
        word = line.split()[0]
        if word != "default" and word[0].isdigit():
            taken.append(ipaddress.IPv4Network(word, strict=False))
    for _ in range(64):
        high, low = os.urandom(2)
        subnet = ipaddress.IPv4Network((bytes((10, 64 + high % 64, low, 0)), 24))
        if not any(subnet.overlaps(network) for network in taken):
            return subnet
    raise NetworkError("no free /24 found in 10.64.0.0/10")


def remove_abandoned() -> None:
    """Takes down networks whose owner was killed before it could."""
    for name in names():
        network = Network.load(name)
        if network.owner_pid and not Path(f"/proc/{network.owner_pid}").exists():
            for host in network.hosts:
                if host.init_pid is not None and not _is_init(host.init_pid, host.directory):
                    host.init_pid = None  # it died with its owner, and the number may be another's by now
            network.destroy()


def _is_init(pid: int, directory: Path) -> bool:
    try:
        return str(directory).encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
