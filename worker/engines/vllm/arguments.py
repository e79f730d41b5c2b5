"""A worker's config as vLLM's engine arguments. Called by engine.py at start."""

from __future__ import annotations

from typing import Any, Final

from vllm.lora.request import LoRARequest

from megatoken.errors import RequestError
from megatoken.worker.config import WorkerConfig
from megatoken.worker.engines.ranks import placement as rank_placement
from megatoken.worker.engines.vllm.resume import PENALTIES_PROCESSOR, penalties_carry_over
from megatoken.worker.models import resolve_source

GIB: Final = 2**30
CPU_KV_CACHE_GIB: Final = 1.0  # vLLM's own default on CPU is nearly all memory
LORA_MODULES: Final = "lora_modules"
THREADS_CLASS: Final = "megatoken.worker.engines.ranks.threads.Threads"


def engine_arguments(config: WorkerConfig) -> dict[str, Any]:
    """Keyword arguments of AsyncEngineArgs; `engine_args` of the config wins over what is derived."""
    arguments: dict[str, Any] = {
        "model": resolve_source(config.source),
        "served_model_name": config.model,
        "dtype": config.dtype,
        "tensor_parallel_size": config.tensor_parallel,
        "pipeline_parallel_size": config.pipeline_parallel,
        "data_parallel_size": config.data_parallel,
        "enable_expert_parallel": config.expert_parallel,
        "disable_log_stats": False,
        "scheduling_policy": "priority",  # with every priority equal it is first come, first served
    }
    if config.max_model_len is not None:
        arguments["max_model_len"] = config.max_model_len
    if config.max_running is not None:
        arguments["max_num_seqs"] = config.max_running
    if config.device_kind == "cpu":
        # Compiling a CPU model takes minutes of cores that the model would serve with.
        arguments["enforce_eager"] = True
        arguments["worker_extension_cls"] = THREADS_CLASS
        arguments["kv_cache_memory_bytes"] = int((config.kv_cache_gib or CPU_KV_CACHE_GIB) * GIB)
    elif config.kv_cache_gib is not None:
        arguments["kv_cache_memory_bytes"] = int(config.kv_cache_gib * GIB)
    executor = rank_placement.executor_class(config)
    if executor is not None:
        arguments["distributed_executor_backend"] = executor
    if penalties_carry_over(config):
        arguments["logits_processors"] = [PENALTIES_PROCESSOR]
    if lora_modules(config):
        arguments["enable_lora"] = True
    arguments.update({name: value for name, value in config.engine_args.items() if name != LORA_MODULES})
    return arguments


def lora_modules(config: WorkerConfig) -> dict[str, LoRARequest]:
    """Adapters by name, from engine_args.lora_modules: {name: path}."""
    modules = config.engine_args.get(LORA_MODULES, {})
    if not isinstance(modules, dict):
        raise RequestError(f"engine_args.{LORA_MODULES}", modules, "an object of adapter names and paths")
    return {name: LoRARequest(name, number, path) for number, (name, path) in enumerate(modules.items(), start=1)}
