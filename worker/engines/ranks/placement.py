"""Puts a replica's engine into the placement group that was reserved for it, with rank i in bundle i.

The worker itself is no Ray process: it hands the group's id on inside vLLM's configuration, and the engine core, which
is a Ray driver of its own, connects by RAY_ADDRESS. Ranks are actors of that driver's job, so Ray ends them when the
engine core dies, however it dies. Called by worker/engines/vllm/engine.py when the config names a placement group.
"""

from __future__ import annotations

import os
from typing import Any

from megatoken.worker.config import WorkerConfig
from megatoken.worker.engines.ranks.variables import DEVICE_VARIABLE, REPLICA_VARIABLE

CPU_RESOURCE = "cpu_device"


def prepare_environment(config: WorkerConfig) -> None:
    """Sets what vLLM needs to find Ray. Call it before vLLM is imported; without a group, it does nothing."""
    if config.placement_group_id is None or config.ray_address is None:
        return
    os.environ["RAY_ADDRESS"] = config.ray_address
    os.environ[REPLICA_VARIABLE] = config.tag
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # Rank i in bundle i, as planned; vLLM's own order sorts nodes by their random ids.
    os.environ["VLLM_RAY_BUNDLE_INDICES"] = ",".join(str(rank) for rank in range(config.world_size))
    address = config.advertise_host or config.host
    os.environ.setdefault("VLLM_HOST_IP", address)
    if config.device_kind == "cpu":
        os.environ[DEVICE_VARIABLE] = CPU_RESOURCE
        # Ranks share a node's cores with other replicas' ranks, which vLLM's own binding knows nothing of.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


def executor_class(config: WorkerConfig) -> type | None:
    """The executor for `distributed_executor_backend`, or None to leave the choice to vLLM."""
    if config.placement_group_id is None:
        return None
    if config.device_kind == "cpu":
        from megatoken.worker.engines.ranks.cpu_ray_executor import CpuRayExecutor

        return CpuRayExecutor
    from megatoken.worker.engines.ranks.ray_executor import MortalRayExecutor

    return MortalRayExecutor


def use_placement_group(config: WorkerConfig, vllm_config: Any) -> None:
    """Makes the engine core place its ranks in the config's group. Connects to nothing."""
    if config.placement_group_id is None:
        return
    from vllm.v1.executor import ray_utils

    group_id = ray_utils.ray.PlacementGroupID.from_hex(config.placement_group_id)
    vllm_config.parallel_config.placement_group = ray_utils.PlacementGroup(group_id)
