"""vLLM's Ray executor (V2), with one thing added: when a rank is lost, the engine core ends within seconds.

vLLM notices the loss at once and asks the engine core's loop to stop, but the loop may be waiting for the lost rank's
answer: queues between hosts are not woken by that, and the wait lasts VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS (300 s). So
the process gets a moment to end in order, and is ended. Used on nodes with accelerators as it is, and by
cpu_executor.py on CPU nodes. Handed to vLLM as a class by ray_placement.py, because vLLM's check for pipeline
parallelism accepts no path.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import Final

from vllm.v1.executor.ray_executor_v2 import RayExecutorV2

ORDERLY_END_S: Final = 1.0

_log = logging.getLogger(__name__)


class MortalRayExecutor(RayExecutorV2):  # type: ignore[misc]
    """An executor that takes its engine core along when it fails."""

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
