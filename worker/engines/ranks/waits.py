"""How ranks that share cores wait for a step: asleep.

Whoever reads one of vLLM's message queues spins for a second after each message before it sleeps on a socket. On
devices of their own that saves microseconds. On shared cores it is what the cores do: with replicas of four and of two
ranks on two cores, and one stream on each, most of the CPU time went there.
"""

from __future__ import annotations

import os
import time
from typing import Final

from vllm.distributed.device_communicators import shm_broadcast
from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

SHARED_MEMORY_VARIABLE: Final = "MEGATOKEN_CPU_SHARED_MEMORY"
BUSY_S: Final = 1.0  # after a message, more are expected
BUSY_LOOK_MS, IDLE_LOOK_MS = 5, 100


class SleepCondition(SpinCondition):  # type: ignore[misc]
    """Sleeps at once, and looks again by itself after a while.

    It must: a writer's wake-up is dropped when the one before it is still on its way (a socket that holds one message),
    and only the spinning of a second hides that.
    """

    def __init__(self, *arguments: object, **options: object) -> None:
        super().__init__(*arguments, **{**options, "busy_loop_s": 0})

    def wait(self, timeout_ms: int | None = None) -> None:
        """As vLLM's, but never for longer than the next look."""
        look_ms = BUSY_LOOK_MS if time.monotonic() < self.last_read + BUSY_S else IDLE_LOOK_MS
        super().wait(look_ms if timeout_ms is None else min(timeout_ms, look_ms))


def ranks_share_cores() -> bool:
    """Whether the model's environment says so: MEGATOKEN_CPU_SHARED_MEMORY=0."""
    return os.environ.get(SHARED_MEMORY_VARIABLE) == "0"


def wait_asleep() -> None:
    """For message queues that this process makes from now on, and those forked from it, where ranks share cores."""
    if ranks_share_cores():
        shm_broadcast.SpinCondition = SleepCondition
