"""The environment that vLLM is started in: set before it is imported, once.

vLLM reads threads, platform and start method from the environment at import, and an OpenMP runtime that is preloaded
has to be there before the process starts. So on CPU the worker executes itself once more with LD_PRELOAD set; its
pid, its parent tie and its ready descriptor stay. Called first thing by worker/__main__.py.
"""

from __future__ import annotations

import ctypes.util
import importlib.metadata
import os
import sys
from pathlib import Path
from typing import Final

from worker.config import WorkerConfig
from worker.engines.ray_placement import prepare_environment
from worker.engines.vllm_plugins import OWNER_VARIABLE

PRELOADED: Final = "MEGATOKEN_PRELOADED"  # set in the second execution
# How long an OpenMP thread spins after a parallel region before it sleeps (ms). Long spins starve the processes that
# share the cores; none at all pays a wake-up for each of a step's hundred regions.
OMP_SPIN_MS: Final = 1


def prepare_process(config: WorkerConfig) -> None:
    """Sets the environment for this config's engine; may execute the process anew, then does not return."""
    environment = os.environ
    environment[OWNER_VARIABLE] = str(os.getpid())
    environment["VLLM_LOGGING_LEVEL"] = config.log_level.upper()
    environment["VLLM_NO_USAGE_STATS"] = "1"
    environment["VLLM_ENGINE_READY_TIMEOUT_S"] = str(int(config.start_timeout_s))
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    prepare_environment(config)
    if config.device_kind != "cpu":
        return
    # The engine's cores are whatever this process may run on; binding would fight other replicas for the same ones.
    environment.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    threads = config.cpu_threads or max(1, len(os.sched_getaffinity(0)) // config.world_size)
    environment["OMP_NUM_THREADS"] = str(threads)
    environment.setdefault("KMP_BLOCKTIME", str(OMP_SPIN_MS))
    environment.setdefault("KMP_TPAUSE", "0")
    if config.engine_args.get("enforce_eager", True):
        # Eager mode leaves a few functions to torch.compile all the same; with tensor parallelism their C++ build would
        # hold up the first token by 20 s.
        environment.setdefault("TORCH_COMPILE_DISABLE", "1")
    if config.placement_group_id is None and PRELOADED not in environment:
        environment[PRELOADED] = "1"
        libraries = preload_libraries()
        if libraries:
            present = environment.get("LD_PRELOAD")
            environment["LD_PRELOAD"] = ":".join(([present] if present else []) + libraries)
            os.execv(sys.executable, [sys.executable, "-m", "worker", *sys.argv[1:]])


def preload_libraries() -> list[str]:
    """What a CPU engine runs faster with: Intel's OpenMP runtime and tcmalloc, each where it is installed."""
    found = []
    try:
        files = importlib.metadata.files("intel-openmp") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    found += [str(Path(str(file.locate())).resolve()) for file in files if file.name == "libiomp5.so"][:1]
    allocator = ctypes.util.find_library("tcmalloc_minimal")
    return found + ([allocator] if allocator else [])
