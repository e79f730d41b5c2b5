"""Where the ranks of a replica run: inside the worker's node as its children, across nodes as Ray's actors.

Across nodes, rank i is in bundle i of the placement group that was reserved. The worker itself is no Ray process: it
hands the group's id on inside vLLM's configuration, and the engine core, which is a Ray driver of its own, connects by
RAY_ADDRESS. Ranks are actors of that driver's job, so Ray ends them when the engine core dies, however it dies.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from megatoken.worker.config import WorkerConfig
from megatoken.worker.engines.ranks.variables import (
    DEVICE_VARIABLE,
    DEVICES_VARIABLE,
    LOSS_VARIABLE,
    PROBLEM,
    REPLICA_VARIABLE,
)

CPU_RESOURCE = "cpu_device"


def prepare_environment(config: WorkerConfig) -> None:
    """Sets what a replica of several ranks needs. Call it before vLLM is imported; for one rank it does nothing."""
    if config.world_size == 1:
        return
    environment = os.environ
    environment[REPLICA_VARIABLE] = config.tag
    environment[LOSS_VARIABLE] = str(_loss_file(config))
    _loss_file(config).unlink(missing_ok=True)
    if config.device_kind == "cpu":
        environment[DEVICE_VARIABLE] = CPU_RESOURCE
    if config.ray_address is None:
        return
    environment["RAY_ADDRESS"] = config.ray_address
    environment["RAY_USAGE_STATS_ENABLED"] = "0"
    # Rank i in bundle i, as planned; vLLM's own order sorts nodes by their random ids.
    environment["VLLM_RAY_BUNDLE_INDICES"] = ",".join(str(rank) for rank in range(config.world_size))
    environment[DEVICES_VARIABLE] = ",".join(str(device) for device in config.rank_devices)
    address = config.advertise_host or config.host
    environment.setdefault("VLLM_HOST_IP", address)


def lost_ranks(config: WorkerConfig) -> list[int]:
    """The ranks that took the engine core along, once it has ended; empty when none did."""
    try:
        ranks = [int(rank) for rank in _loss_file(config).read_text().split()]
    except (OSError, ValueError):
        return []
    _loss_file(config).unlink(missing_ok=True)
    return ranks


def start_problem(config: WorkerConfig) -> str:
    """Why the ranks did not start, as one of them said it; empty: none did."""
    path = _loss_file(config).with_name(_loss_file(config).name + PROBLEM)
    try:
        said = path.read_text()
    except OSError:
        return ""
    path.unlink(missing_ok=True)
    return said


def _loss_file(config: WorkerConfig) -> Path:
    return Path(config.counters_dir).parent / f"{config.replica}.lost"


def executor_class(config: WorkerConfig) -> type | None:
    """The executor for `distributed_executor_backend`, or None to leave the choice to vLLM."""
    if config.placement_group_id is None:
        if config.world_size == 1:
            return None
        from megatoken.worker.engines.ranks.local_executor import LocalExecutor

        return LocalExecutor
    if config.device_kind == "cpu":
        from megatoken.worker.engines.ranks.cpu_ray_executor import CpuRayExecutor

        return CpuRayExecutor
    from megatoken.worker.engines.ranks.ray_executor import PlacedRayExecutor

    return PlacedRayExecutor


def use_placement_group(config: WorkerConfig, vllm_config: Any) -> None:
    """Makes the engine core place its ranks in the config's group. Connects to nothing."""
    if config.placement_group_id is None:
        return
    from vllm.v1.executor import ray_utils

    group_id = ray_utils.ray.PlacementGroupID.from_hex(config.placement_group_id)
    vllm_config.parallel_config.placement_group = ray_utils.PlacementGroup(group_id)
