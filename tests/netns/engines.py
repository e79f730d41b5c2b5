"""Workers with real engines on hosts, started as the control plane starts them: in a reserved placement group."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from deploy.netns.hosts import Host
from deploy.netns.ray_nodes import RayNodes
from megatoken.v1 import tokens_pb2, tokens_pb2_grpc

START_TIMEOUT_S = 240.0
RESERVE = """
import json, sys, ray
from ray.util.placement_group import placement_group
ray.init(logging_level="ERROR")
bundles = [{"cpu_device": 1, f"node:{address}": 0.001} for address in json.loads(sys.argv[1])]
group = placement_group(bundles, strategy="PACK", lifetime="detached")
ray.get(group.ready(), timeout=30)
print(group.id.hex())
"""
RELEASE = """
import sys, ray
from ray import PlacementGroupID
from ray.util.placement_group import PlacementGroup, remove_placement_group
ray.init(logging_level="ERROR")
remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(sys.argv[1])))
"""


def reserve(nodes: RayNodes, hosts: Sequence[Host]) -> str:
    """A detached placement group with bundle i on hosts[i]; returns its id."""
    addresses = json.dumps([host.address for host in hosts])
    done = nodes.head.run([sys.executable, "-c", RESERVE, addresses], nodes.environment(nodes.head))
    return done.stdout.split()[-1]


def release(nodes: RayNodes, group: str) -> None:
    """Gives a placement group back."""
    nodes.head.run([sys.executable, "-c", RELEASE, group], nodes.environment(nodes.head))


@dataclass
class RunningWorker:
    """A worker on a host. `door` is the process on this machine that entered the host; killing it kills the worker."""

    host: Host
    door: subprocess.Popen[str]
    address: str

    def pids(self, word: str) -> list[int]:
        """PIDs of the host's processes with `word` in their title."""
        return [pid for pid, command in self.host.processes().items() if word in command]

    def generate(self, prompt: Sequence[int], tokens: int, timeout_s: float = 120.0) -> list[int]:
        """Greedy tokens for a prompt. Raises grpc.RpcError."""
        request = tokens_pb2.GenerateRequest(
            model="model",
            prompt=prompt,
            sampling=tokens_pb2.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True),
        )
        with grpc.insecure_channel(self.address) as channel:
            stub = tokens_pb2_grpc.TokensStub(channel)
            return [token for part in stub.Generate(request, timeout=timeout_s) for token in part.tokens]

    def stop(self) -> int:
        """Asks it to end, and waits."""
        for pid in self.pids("-m megatoken.worker"):
            subprocess.run(["kill", "-TERM", str(pid)], check=False)
        if self.door.stdout is not None:
            self.door.stdout.close()
        return self.door.wait(timeout=60)


def start_worker(nodes: RayNodes, host: Host, group: str | None, **config: Any) -> RunningWorker:
    """Starts `python -m megatoken.worker` on a host, and waits until it is ready."""
    whole = {
        "replica": f"replica-{group[-6:] if group else host.name}",
        "model": "model",
        "host": host.address,
        "unguarded": True,  # no control plane stands behind it
        "counters_dir": "/tmp/counters",
        "node": host.name,
        "dtype": "float32",
        "max_model_len": 512,
        "max_running": 8,
        "kv_cache_gib": 0.25,
        "cpu_threads": 1,
        "log_level": "warning",
        **config,
    }
    if group is not None:
        ranks = config.get("tensor_parallel", 1) * config.get("pipeline_parallel", 1)
        whole |= {"ray_address": nodes.address, "placement_group_id": group, "rank_devices": [0] * ranks}
    path = f"/tmp/{whole['replica']}.json"
    host.path(path).write_text(json.dumps(whole))
    log = host.path(f"/tmp/{whole['replica']}.log")
    with log.open("w") as errors:
        door = host.popen(
            [sys.executable, "-m", "megatoken.worker", "--config", path],
            nodes.environment(host),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    if door.stdout is None:
        raise RuntimeError("the worker's output is not a pipe")
    said = []
    for line in door.stdout:
        if line.startswith('{"address"'):
            return RunningWorker(host, door, json.loads(line)["address"])
        said.append(line)
    raise RuntimeError(f"the worker ended with {door.wait()}\n{''.join(said)[-4000:]}\n{log.read_text()[-4000:]}")
