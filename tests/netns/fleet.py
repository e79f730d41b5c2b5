"""The fleet of test_whole_fleet.py: its spec, certificates and keys, and `megatoken` over ssh."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from deploy.netns.hosts import Host, Network
from megatoken.cluster.client.control import CommandError, client_of
from megatoken.cluster.client.records import read_records
from megatoken.counters import NAMES, read_counters
from megatoken.process.tag import PREFIX
from megatoken.v1 import control_pb2, throughput_pb2
from megatoken.worker.models import TINY_LLAMA, prepare
from tests.netns.sshd import PORT, keygen, public, start_sshd
from tests.support.certificates import Authority
from tests.support.collector import Collector
from tests.support.terminal import Terminal

KEY = "flagship-key"
SLOTS = {"node0": 2, "node1": 3, "node2": 3}
UP_S = 400.0
WEIGHTS, NEXT = "/tmp/weights/tiny", "/tmp/weights/next"  # each host has a /tmp of its own; only the head has them
EDGE_PORT = 8000


class Fleet:
    """Made of a network; `up` brings it up, `down` takes it down and looks at what is left."""

    def __init__(self, network: Network, directory: Path) -> None:
        self.network, self.directory, self.head = network, directory, network.hosts[0]
        self.pki = network.directory / "pki"  # seen from every host, which /tmp is not
        self.pki.mkdir(mode=0o700)
        self.authority = Authority(self.pki)
        everywhere = [host.address for host in network.hosts]
        self.cert_file, self.key_file = self.authority.issue("node", hosts=everywhere)
        self.keys_file = self.pki / "keys.json"
        self.keys_file.write_text(
            json.dumps({"keys": [{"name": "team", "sha256": hashlib.sha256(KEY.encode()).hexdigest()}]})
        )
        self.keys_file.chmod(0o600)
        keygen("client", directory)
        for host in network.hosts:
            keygen(host.name, directory)
            start_sshd(host, directory)
        (directory / "known_hosts").write_text(
            "".join(f"[{host.address}]:{PORT} {public(directory / host.name)}\n" for host in network.hosts)
        )
        self.collector = Collector(network.machine_address)  # traces nothing but what asks for it
        self.killed: set[str] = set()  # replicas whose worker had no time to account for what it had
        self.spec = self._spec()
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MEGATOKEN_"))},
            "MEGATOKEN_STATE_DIR": str(directory / "state"),
        }

    def _spec(self) -> dict[str, Any]:
        tls = {"cert_file": str(self.cert_file), "key_file": str(self.key_file), "ca_file": str(self.authority.ca_file)}
        engine = {
            "dtype": "float32",
            "max_model_len": 256,
            "max_running": 8,
            "kv_cache_gib": 0.2,
            "cpu_threads": 1,
            "env": {"MEGATOKEN_CPU_SHARED_MEMORY": "0"},  # many ranks share two cores: their waits give them away
        }
        return {
            "cluster": "flagship",
            "control": {"worker_lease_s": 10, "hang_s": 10, "probe_s": 3},  # two cores start engines and serve at once
            "routers": {"per_node": True, "resume": {"wait_s": 240, "max_resumes": 20}},
            "edge": {"per_node": True},
            "tracing": {"endpoint": self.collector.endpoint, "sample": 0},
            "agents": {"enabled": True, "tick_s": 2, "deadline_s": 10},
            "security": {"tls": {**tls, "mutual": True}, "api_keys_file": str(self.keys_file)},
            "models": [
                {
                    "name": "tiny",
                    "source": WEIGHTS,
                    "parallel": {"tensor": 2, "pipeline": 2},
                    "placement": {"nodes": [host.address for host in self.network.hosts[1:]]},
                    **engine,
                },
                {"name": "smol", "source": "builtin:smollm2-135m-instruct", "parallel": {"pipeline": 2}, **engine},
            ],
            "launch": {
                "ssh": {
                    "hosts": [
                        {"host": host.address, "cpu_devices": SLOTS[host.name], "rack": host.name}
                        for host in self.network.hosts
                    ],
                    "user": "root",
                    "port": PORT,
                    "identity_file": str(self.directory / "client"),
                    "known_hosts_file": str(self.directory / "known_hosts"),
                    "start_timeout_s": 150,
                    "prefix": sys.prefix,
                    "directory": "/tmp/mt",
                }
            },
        }

    def megatoken(self, *words: str, timeout_s: float = 60.0) -> str:
        """Runs `megatoken WORDS` on this machine, as the operator; returns what it printed."""
        done = subprocess.run(
            [sys.executable, "-m", "megatoken.cluster.cli", *words],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if done.returncode:
            raise CommandError(f"megatoken {' '.join(words)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def up(self) -> None:
        path = self.directory / "spec.yaml"
        path.write_text(yaml.safe_dump(self.spec))
        for directory in (WEIGHTS, NEXT):
            shutil.copytree(prepare(TINY_LLAMA, lambda _line: None), self.head.path(directory))
        self.fetch()
        self.megatoken("up", "-f", str(path), "--timeout", str(UP_S), timeout_s=UP_S + 60)
        (record,) = read_records(self.directory / "state")
        self.control = client_of(record)

    def fetch(self, *options: str) -> None:
        """The weights of the spec's models on every host."""
        path = self.directory / "spec.yaml"
        path.write_text(yaml.safe_dump(self.spec))
        fetched = self.megatoken("fetch", "-f", str(path), *options, timeout_s=UP_S)
        if "on 3 nodes" not in fetched:
            raise AssertionError(f"the hosts have not all the same weights: {fetched}")

    def token_files(self, host: Host) -> list[Path]:
        """Where a host keeps Ray's token."""
        return list(host.path("/tmp/mt").glob("*/ray_token"))

    def down(self) -> None:
        dark = [host.address for host in self.network.hosts if host.init_pid is None]
        try:
            self.megatoken("down", timeout_s=180)
        except CommandError as error:
            if not dark or not all(address in str(error) for address in dark):
                raise
        kept = [str(path) for host in self.network.hosts if host.init_pid for path in self.token_files(host)]
        kept += [str(path) for path in (self.directory / "state").iterdir()] if not dark else []
        if kept:
            raise AssertionError(f"left behind by `megatoken down`: {kept}")
        left = [f"{host.name}: {text}" for host in self.network.hosts for text in host.processes().values()]
        left = [text for text in left if "sshd" not in text]
        if left:
            raise AssertionError(f"left behind by `megatoken down`: {left}")

    def scale(self, model: str, replicas: int) -> None:
        self.megatoken("scale", f"{model}={replicas}")
        self.change(model, replicas=replicas)

    def change(self, model: str, **fields: Any) -> None:
        """Changes fields of a model in the spec, for `fetch` and `apply`."""
        next(entry for entry in self.spec["models"] if entry["name"] == model).update(fields)

    def apply(self) -> None:
        path = self.directory / "changed.yaml"
        path.write_text(yaml.safe_dump({**self.spec, "launch": None, "ray": {"address": f"{self.head.address}:6379"}}))
        self.megatoken("apply", "-f", str(path))

    # -- looking --

    def status(self) -> control_pb2.ClusterStatus:
        return self.control.status()

    def wait(self, met: Callable[[control_pb2.ClusterStatus], bool], timeout_s: float) -> control_pb2.ClusterStatus:
        """The first status that meets a condition, while the controller may be away. Raises with the events."""
        deadline, last = time.monotonic() + timeout_s, ""
        while True:
            try:
                status = self.status()
                if met(status):
                    return status
                last = "\n".join(f"{row.replica} {row.state} {row.reason}" for row in status.replicas)
            except CommandError as error:
                last = str(error)
            if time.monotonic() > deadline:
                raise TimeoutError(f"not met within {timeout_s:g} s; last: {last}\n{self.events()}")
            time.sleep(0.1)

    def events(self) -> str:
        """The latest, or why there are none."""
        try:
            return self.megatoken("events")[-6000:]
        except CommandError as error:
            return str(error)

    def ready(self, model: str, count: int, timeout_s: float = 30.0) -> list[control_pb2.ReplicaStatus]:
        """The READY replicas of a model, once there are `count` and no other of it is live."""

        def met(status: control_pb2.ClusterStatus) -> bool:
            live = [row for row in status.replicas if row.model == model and row.state not in ("STOPPED", "FAILED")]
            return len(live) == count and all(row.state == "READY" for row in live)

        rows = self.wait(met, timeout_s).replicas
        return [row for row in rows if row.model == model and row.state == "READY"]

    def failed(self, status: control_pb2.ClusterStatus) -> set[str]:
        """Replicas that failed, also those that `status` shows no more."""
        return {row.replica for row in status.replicas if row.state == "FAILED"}

    def blocked(self, status: control_pb2.ClusterStatus, model: str) -> str:
        return next(row.blocked for row in status.models if row.model == model)

    def source(self, model: str) -> str:
        """That its replicas are made from."""
        return next(row.source for row in self.status().models if row.model == model)

    def hosts_of(self, replica: control_pb2.ReplicaStatus) -> list[Host]:
        """The hosts of its ranks, in rank order, each once."""
        found = [re.search(r": (\S+) device", line) for line in replica.ranks]
        names = dict.fromkeys(match[1] for match in found if match)
        return [next(host for host in self.network.hosts if name in (host.address, host.name)) for name in names]

    def pids(self, host: Host, words: str) -> list[int]:
        return [pid for pid, command in host.processes().items() if words in command]

    def incarnations(self) -> dict[str, throughput_pb2.Totals]:
        """What each replica that there ever was counted, from the counter files on every host."""
        found = {}
        for host in self.network.hosts:
            for path in host.path("/tmp").glob(f"megatoken-*/{self.spec['cluster']}/*/counters/*.counters"):
                header, totals = read_counters(path)
                if header["kind"] == "worker":
                    found[header["id"]] = throughput_pb2.Totals(**dict(zip(NAMES, totals, strict=True)))
        return found

    def top(self, *texts: str) -> None:
        """Has `megatoken top` on a wide terminal until it shows these."""
        command = f"{sys.executable} -m megatoken.cluster.cli top"
        with Terminal(command, width=200, height=50, env=self.environment) as terminal:
            terminal.wait_for(*texts)

    def crash_ray(self, host: Host) -> None:
        """Kills every process of a host's Ray but its supervisor, which starts it again."""
        for pid, command in host.processes().items():
            if "sshd" not in command and "megatoken.cluster.launchers.node" not in command:
                try:
                    os.kill(pid, 9)
                except ProcessLookupError:
                    continue


def tagged(fleet: Fleet, host: Host, replica: str, part: str) -> list[int]:
    """Processes of a host that are a part of a replica ("worker", "engine", "rank"), by part."""
    found = []
    for pid in host.processes():
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                name = os.readlink(link)
            except OSError:
                continue
            if name.startswith(f"/memfd:{PREFIX}") and f"-{replica}:{part}" in name:
                found.append((name, pid))
    return [pid for _, pid in sorted(found)]
