"""vLLM's Ray executor (V2), with one thing added: when a rank is lost, the engine core ends within seconds.

vLLM notices the loss at once and asks the engine core's loop to stop, but the loop may be waiting for the lost rank's
answer: queues between hosts are not woken by that, and the wait lasts VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS (300 s). So
the process gets a moment to end in order, and is ended. Used on nodes with accelerators as it is, and by
cpu_ray_executor.py on CPU nodes. Handed to vLLM as a class by placement.py, because vLLM's check for pipeline
parallelism accepts no path.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import Any, Final

from vllm.v1.executor import ray_executor_v2
from vllm.v1.executor.ray_executor_v2 import RayExecutorV2, RayWorkerProc

from megatoken.process.tag import tag_process
from megatoken.worker.engines.ranks.variables import REPLICA_VARIABLE

ORDERLY_END_S: Final = 1.0

_log = logging.getLogger(__name__)


class MarkedRank(RayWorkerProc):  # type: ignore[misc]
    """A rank process that can be found as what it is."""

    def __init__(self, vllm_config: Any, rank: int, *arguments: Any, **options: Any) -> None:
        replica = os.environ.get(REPLICA_VARIABLE)
        if replica:
            tag_process(replica, f"rank {rank}")
        super().__init__(vllm_config, rank, *arguments, **options)


class MortalRayExecutor(RayExecutorV2):  # type: ignore[misc]
    """An executor that takes its engine core along when it fails."""

    rank_class: type = MarkedRank

    def _init_executor(self) -> None:
        ray_executor_v2.RayWorkerProc = self.rank_class  # the executor names its rank class in no other place
        super()._init_executor()

    def _build_runtime_env(self) -> dict[str, Any]:
        environment: dict[str, Any] = super()._build_runtime_env()
        if REPLICA_VARIABLE in os.environ:
            environment.setdefault("env_vars", {})[REPLICA_VARIABLE] = os.environ[REPLICA_VARIABLE]
        return environment

    def shutdown(self) -> None:
        """Ends the ranks. vLLM calls it from its monitor's thread, with `is_failed` set, when one was lost."""
        if getattr(self, "is_failed", False):
            threading.Thread(target=_end_process, name="executor-failed", daemon=True).start()
        super().shutdown()


def _end_process() -> None:
    """Ends this process, in case it has not ended by itself. Its ranks' actors end with it, as Ray sees its job end."""
    time.sleep(ORDERLY_END_S)
    _log.error("a rank was lost and the engine core still waits for it: ending the engine core")
    os._exit(1)
