"""The environment that vLLM is started in: set before it is imported, once.

vLLM, torch and the OpenMP runtime read threads, platform and wait policy from the environment when they are loaded.
Called first thing by worker/__main__.py.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from megatoken.worker.config import WorkerConfig
from megatoken.worker.engines.ranks.placement import prepare_environment
from megatoken.worker.engines.vllm.plugins import OWNER_VARIABLE

SPIN_COUNT: Final = "10000"  # looks of libgomp at a flag: a fraction of a millisecond
SOCKET_PATH_BYTES: Final = 107  # Linux: what the name of a Unix socket may have
SOCKET_NAME_BYTES: Final = 37  # vLLM's: a slash and a UUID


def prepare_process(config: WorkerConfig) -> None:
    """Sets the environment for this config's engine. The config's own `env` was set before and wins where it may."""
    environment = os.environ
    environment[OWNER_VARIABLE] = str(os.getpid())
    environment["VLLM_LOGGING_LEVEL"] = config.log_level.upper()
    environment["VLLM_NO_USAGE_STATS"] = "1"
    environment["VLLM_ENGINE_READY_TIMEOUT_S"] = str(int(config.start_timeout_s))
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    sockets = Path(config.counters_dir).absolute().parent
    if len(os.fsencode(sockets)) + SOCKET_NAME_BYTES <= SOCKET_PATH_BYTES and sockets.is_dir():
        # An engine that is killed leaves its sockets behind: there they go with the cluster, in /tmp they would stay.
        environment.setdefault("VLLM_RPC_BASE_PATH", str(sockets))
    prepare_environment(config)
    if config.device_kind != "cpu":
        return
    # The engine's cores are whatever this process may run on; binding would fight other replicas for the same ones.
    environment.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    environment["OMP_NUM_THREADS"] = str(config.threads(len(os.sched_getaffinity(0))))
    environment.setdefault("OMP_WAIT_POLICY", "passive")
    if config.cpu_threads is None and environment["OMP_WAIT_POLICY"] == "passive":
        # All ranks' threads together are no more than the cores, also when ranks come and go (set_threads), so one that
        # waits for the next parallel region may spin for the moment that it is away, and is there at once; what the
        # process in front needs is less than that. Threads that somebody chose may be too many: those sleep.
        environment.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    if config.engine_args.get("enforce_eager", True):
        # Eager mode leaves a few functions to torch.compile all the same; with tensor parallelism their C++ build would
        # hold up the first token by 20 s.
        environment.setdefault("TORCH_COMPILE_DISABLE", "1")
