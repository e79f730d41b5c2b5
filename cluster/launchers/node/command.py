"""The command that starts Ray on one machine. Pure; ssh, systemd, Slurm, KubeRay and compose are made of it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from megatoken.cluster.launchers.failure_detection import FAILURE_DETECTION
from megatoken.cluster.launchers.node.store import ADDRESS
from megatoken.cluster.launchers.spec import DeviceGroup, RayPorts, RedisStore
from megatoken.cluster.spec.cluster import ClusterSpec

TOKEN_FILE = "ray_token"
MIB = 1 << 20
# Ray's own habits that do not suit a fleet: usage statistics, its metrics agent, blanking the devices of an actor that
# asked Ray for none (the supervising actor starts engines that must see them), nice 15 for its actors and all that they
# start, and slow failure detection.
RAY_HABITS = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    **FAILURE_DETECTION,
}


@dataclass(frozen=True, slots=True)
class NodeCommand:
    """What one machine runs. `{address}` in ray stands for the node's own address."""

    ray: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)
    head: bool = False


def node_command(
    spec: ClusterSpec,
    ports: RayPorts,
    group: DeviceGroup,
    *,
    ray: str,
    head_address: str,
    head: bool,
    token_path: str | None,
    redis: RedisStore | None = None,
) -> NodeCommand:
    """`ray`: the program. `token_path`: the token's file there; None where RAY_AUTH_TOKEN comes another way.

    `redis`: where the head keeps what it knows; it is then started without --block, and looked after by its supervisor.
    """
    words = [ray, "start", "--node-ip-address={address}"]
    words += ["--head", f"--port={ports.head}"] if head else [f"--address={head_address}:{ports.head}"]
    words += ray_options(spec, ports, group, head=head)
    env = node_env_of(spec, group, token_path)
    if head and redis is not None:
        env[ADDRESS] = redis.address
    else:
        words.append("--block")
    return NodeCommand(tuple(words), env, head)


def ray_options(spec: ClusterSpec, ports: RayPorts, group: DeviceGroup, *, head: bool) -> list[str]:
    """Options of `ray start` that do not depend on the way in. No CPUs are offered: nothing of ours asks for any, and
    Ray would start an idle Python process for each."""
    words = ["--num-cpus=0", "--disable-usage-stats", f"--object-store-memory={spec.ray.object_store_mib * MIB}"]
    if head:
        words.append("--include-dashboard=false")
    if group.gpus is not None:
        words.append(f"--num-gpus={group.gpus}")
    if group.cpu_devices:
        words.append(f"--resources={json.dumps({'cpu_device': group.cpu_devices}, separators=(',', ':'))}")
    if group.node_labels:
        words.append("--labels=" + ",".join(f"{name}={value}" for name, value in sorted(group.node_labels.items())))
    for option, port in (("node-manager-port", ports.node_manager), ("object-manager-port", ports.object_manager)):
        if port is not None:
            words.append(f"--{option}={port}")
    if ports.workers:
        words += [f"--min-worker-port={ports.workers[0]}", f"--max-worker-port={ports.workers[1]}"]
    return words


def node_env_of(spec: ClusterSpec, group: DeviceGroup, token_path: str | None) -> dict[str, str]:
    """Environment of `ray start`, which every process on the node inherits: the fleet's, then the machine's own."""
    env = {**RAY_HABITS, "RAY_AUTH_MODE": "token"}
    if token_path is not None:
        env["RAY_AUTH_TOKEN_PATH"] = token_path
    return {**env, **given_env(spec, group)}


def given_env(spec: ClusterSpec, group: DeviceGroup) -> dict[str, str]:
    """What the spec itself gives: it may hold secrets. Raises ValueError for a value of several lines."""
    given = {**spec.network.env, **group.env}
    for name, value in given.items():
        if "\n" in value:
            raise ValueError(f"env: {name} is not allowed; its value must be one line")
    return given


def spec_on(spec: ClusterSpec, ray_address: str) -> ClusterSpec:
    """The spec as the head is given it: on the Ray that was started, and with nothing left to launch."""
    ray = spec.ray.model_copy(update={"address": ray_address})
    return spec.model_copy(update={"ray": ray, "launch": None})
