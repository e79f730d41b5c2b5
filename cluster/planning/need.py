"""What one rank of a model's replica needs in device memory. Pure; the spec's check and `megatoken plan` call it."""

from __future__ import annotations

from megatoken.cluster.inventory.model_memory import (
    DEFAULT_BATCHED_TOKENS,
    DEFAULT_UTILISATION,
    MemoryNeed,
    memory_need,
)
from megatoken.cluster.inventory.model_shape import GIB, ModelShape
from megatoken.cluster.spec.model import ModelSpec

CPU_RUNTIME_BYTES = GIB  # a rank of vLLM's CPU build beside weights and cache: about 1.0 GiB measured
CPU_BATCHED_TOKENS = 2048


def need_of(
    model: ModelSpec, shape: ModelShape, *, tensor: int | None = None, pipeline: int | None = None, cpu: bool = False
) -> MemoryNeed:
    """The estimate for the spec's own sizes, or for others in their place."""
    args = model.engine_args
    batched = args.get("max_num_batched_tokens")
    utilisation = args.get("gpu_memory_utilization", DEFAULT_UTILISATION)
    default_batched = CPU_BATCHED_TOKENS if cpu else DEFAULT_BATCHED_TOKENS
    return memory_need(
        shape,
        tensor=tensor or model.parallel.tensor,
        pipeline=pipeline or model.parallel.pipeline,
        max_model_len=model.max_model_len,
        utilisation=1.0 if cpu else float(utilisation),
        batched_tokens=int(batched) if batched else default_batched,
        runtime_bytes=CPU_RUNTIME_BYTES if cpu else GIB * 3 // 2,
    )


def device_need_bytes(model: ModelSpec, shape: ModelShape | None) -> int:
    """What ReplicaRequest.device_memory_bytes should say: the spec's figure, else the estimate, else 0 (unknown).

    A spec with kv_cache_gib is taken as one for CPU nodes, where the cache is as large as the spec says.
    """
    if model.device_memory_gib:
        return int(model.device_memory_gib * GIB)
    if shape is None or model.engine != "vllm":
        return 0
    if model.kv_cache_gib is None:
        return need_of(model, shape).device
    need = need_of(model, shape, cpu=True)
    return need.weights + need.workspace + max(need.kv_least, int(model.kv_cache_gib * GIB))
