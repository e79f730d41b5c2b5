"""A Ray cluster over the hosts of a network: one Ray node each, with token authentication and CPU device slots.

It starts what people start by hand (`ray start --head`, `ray start --address`) under the supervisor that launchers use,
with small object stores and the failure detection of a deployed cluster, and hands out the environment that a driver or
a `megatoken` command needs. Called by the command line (`python -m deploy.netns`) and by tests.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from deploy.netns.hosts import Host, Network, NetworkError
from megatoken.cluster.launchers.failure_detection import FAILURE_DETECTION

GCS_PORT = 6379
NODE_DIRECTORY = "/tmp/node"  # of the supervisor, in the host
START_TIMEOUT_S = 180.0
PARALLEL_STARTS = 8
OBJECT_STORE_BYTES = 80 * 1024 * 1024  # Ray's floor is 75 MiB; tokens do not travel through it
REPOSITORY = Path(__file__).parents[2]


class RayNodes:
    """Ray on the hosts of a network; the first started is the head."""

    def __init__(
        self,
        network: Network,
        devices: int,
        detection: Mapping[str, str] | None = None,
        *,
        gpus: int | None = None,
        env: Mapping[str, str] | None = None,
        redis: str = "",
    ) -> None:
        """`devices`: cpu_device slots of each node. `gpus`: what it claims to have. `env`: of Ray and its actors.

        `redis`: HOST:PORT where the head keeps what it knows; else its memory.
        """
        self.network = network
        self.gpus = gpus
        self.env = dict(env or {})
        self.redis = redis
        self.devices = devices
        self.detection = dict(FAILURE_DETECTION if detection is None else detection)
        self.token_file = network.directory / "ray-token"
        if not self.token_file.exists():
            descriptor = os.open(self.token_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(secrets.token_hex(32))

    @property
    def head(self) -> Host:
        return self.network.hosts[0]

    @property
    def address(self) -> str:
        """What RAY_ADDRESS is for this cluster."""
        return f"{self.head.address}:{GCS_PORT}"

    def environment(self, host: Host, **more: str) -> dict[str, str]:
        """The whole environment of a process in `host`: this process's own, less what ties it to another cluster."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("RAY_", "MEGATOKEN_", "VLLM_", "GLOO_", "NCCL_"))
        }
        scripts = str(Path(sys.executable).parent)
        kept["PATH"] = f"{scripts}:{kept.get('PATH', '/usr/bin:/bin')}"
        kept["PYTHONPATH"] = str(REPOSITORY)
        return (
            kept | self._ray_environment() | {"RAY_ADDRESS": self.address, "MEGATOKEN_STATE_DIR": "/tmp/state"} | more
        )

    def _ray_environment(self) -> dict[str, str]:
        return {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token_file),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
            **self.detection,
        }

    def start(
        self,
        labels: Mapping[str, Mapping[str, str]] | None = None,
        devices: Mapping[str, int] | None = None,
        env: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        """Starts Ray on every host: on the head, then on the others at once. The maps go by the host's name."""

        def start_one(host: Host) -> None:
            self.start_node(
                host, (labels or {}).get(host.name), (devices or {}).get(host.name), (env or {}).get(host.name)
            )

        start_one(self.head)
        with ThreadPoolExecutor(PARALLEL_STARTS) as pool:
            list(pool.map(start_one, self.network.hosts[1:]))

    def start_node(
        self,
        host: Host,
        labels: Mapping[str, str] | None = None,
        devices: int | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        """Starts Ray on one host: as the head on the first, joined to it on any other. `env`: more than the others'."""
        slots = self.devices if devices is None else devices
        head = ["--head", f"--port={GCS_PORT}", "--include-dashboard=false"]
        role = head if host is self.head else [f"--address={self.address}"]
        keeps = host is self.head and self.redis  # without --block: see megatoken.cluster.launchers.node.store
        supervisor = [sys.executable, "-m", "megatoken.cluster.launchers.node", "start", "--directory", NODE_DIRECTORY]
        command = [
            *(*supervisor, "--address", host.address, "--"),
            *(sys.executable, "-m", "ray.scripts.scripts", "start", *([] if keeps else ["--block"]), *role),
            *(f"--node-ip-address={host.address}", "--num-cpus=2", "--disable-usage-stats"),
            *(f"--object-store-memory={OBJECT_STORE_BYTES}", f"--resources={json.dumps({'cpu_device': slots})}"),
            *([] if self.gpus is None else [f"--num-gpus={self.gpus}"]),
            f"--labels={','.join(f'{key}={value}' for key, value in {'host': host.name, **(labels or {})}.items())}",
        ]
        environment = self.environment(host, **self.env, **(env or {}))
        environment |= {"RAY_REDIS_ADDRESS": self.redis} if keeps else {}
        del environment["RAY_ADDRESS"]
        host.run(command, environment, timeout_s=START_TIMEOUT_S)

    def stop_node(self, host: Host) -> None:
        """Kills the host's Ray processes, its workers and its supervisor included: it does not start again."""
        self._kill(host, lambda command: "ray" in command)

    def crash_node(self, host: Host) -> None:
        """Kills the host's Ray processes, its workers included. Its supervisor starts Ray again."""
        self._kill(host, lambda command: "ray" in command and "megatoken.cluster.launchers.node" not in command)

    def _kill(self, host: Host, chosen: Callable[[str], bool]) -> None:
        for pid, command in host.processes().items():
            if chosen(command):
                try:
                    os.kill(pid, 9)
                except ProcessLookupError:
                    pass

    def ray_pids(self, host: Host, *words: str) -> list[int]:
        """PIDs (on this machine) of the host's processes whose command line holds all of `words`."""
        return [pid for pid, command in host.processes().items() if all(word in command for word in words)]

    def wait_for(self, host: Host, words: str, timeout_s: float) -> list[int]:
        """Waits until some process of the host has `words` in its command line."""
        deadline = time.monotonic() + timeout_s
        while not (found := self.ray_pids(host, words)):
            if time.monotonic() > deadline:
                raise NetworkError(f"{host.name}: no process {words!r} within {timeout_s} s")
            time.sleep(0.05)
        return found
