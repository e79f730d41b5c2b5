"""What is ours in both of vLLM's executors: ranks say where they run, and a lost one ends the engine core in seconds.

vLLM notices the loss at once and asks the engine core's loop to stop, but the loop may be waiting for the lost rank's
answer: queues between hosts are not woken by that, and the wait lasts VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS (300 s). So
the process gets a moment to end in order, and is ended. local_executor.py and ray_executor.py put this before vLLM's
own classes.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any, Final

from megatoken.process.devices import VISIBILITY
from megatoken.process.tag import tag_process
from megatoken.worker.engines.ranks.variables import LOSS_VARIABLE, PROBLEM, REPLICA_VARIABLE
from megatoken.worker.engines.ranks.waits import wait_asleep

ORDERLY_END_S: Final = 1.0
LOSS_S: Final = 2.0  # for the news that a rank died; Ray has it within half a second

_log = logging.getLogger("vllm.megatoken")  # vLLM sets its own logger up in every process, spawned ones included


class MortalExecutor:
    """An executor that takes its engine core along when it fails, and writes into its log where its ranks run."""

    def _init_executor(self) -> None:
        wait_asleep()
        try:
            super()._init_executor()  # type: ignore[misc]
        except Exception as error:
            note_problem(error)
            raise

    def _post_init_executor(self) -> None:
        super()._post_init_executor()  # type: ignore[misc]
        for said in self.collective_rpc(report_rank):  # type: ignore[attr-defined]
            _log.info("%s", said)

    def shutdown(self) -> None:
        """Ends the ranks. vLLM calls it from its monitor's thread, with `is_failed` set, when one was lost.

        The engine core calls it too, when an answer of a rank was an error because another was lost; all end then, so
        the first call is the one that sees who was first.
        """
        try:
            note_loss(self._ranks_to_blame())
        except Exception:  # the end of the engine core must not hang on its reason
            _log.exception("which rank was lost is not known")
        if getattr(self, "is_failed", False):
            threading.Thread(target=_end_process, name="executor-failed", daemon=True).start()
        super().shutdown()  # type: ignore[misc]

    def lost_ranks(self) -> list[int]:
        """Ranks that are known to have died."""
        raise NotImplementedError

    def ended_ranks(self) -> list[int]:
        """Ranks that have ended in whatever way; some because another died."""
        return self.lost_ranks()

    def _ranks_to_blame(self) -> list[int]:
        """A rank that died cuts its peers' connections at once, so their errors come here before the news of it."""
        failing = getattr(self, "is_failed", False) or sys.exc_info()[0] not in (None, SystemExit)
        deadline = time.monotonic() + (LOSS_S if failing else 0.0)
        while not (lost := self.lost_ranks()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return lost or self.ended_ranks()


def note_loss(ranks: list[int]) -> None:
    """Tells the worker, which reads it once the engine core has ended (placement.py)."""
    path = os.environ.get(LOSS_VARIABLE)
    if path and ranks and not Path(path).exists():
        Path(path).write_text(" ".join(map(str, ranks)))


def note_problem(error: Exception) -> None:
    """Tells the worker why the ranks did not start: vLLM itself only says that they did not."""
    path = os.environ.get(LOSS_VARIABLE)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if path and lines:
        Path(path + PROBLEM).write_text(lines[-1])


def mark_rank(rank: int) -> None:
    """Lets this process be found as a rank of its replica."""
    replica = os.environ.get(REPLICA_VARIABLE)
    if replica:
        tag_process(replica, f"rank {rank}")


def report_rank(worker: Any) -> str:
    """Runs in each rank: marks its process, and says which device it was given."""
    mark_rank(worker.rank)
    given = worker.vllm_config.parallel_config.assigned_physical_gpu_ids or ()
    visible = next((os.environ[name] for name in VISIBILITY if os.environ.get(name)), "")
    devices = [str(device) for device in given] or [name for name in visible.split(",") if name]
    device = devices[worker.local_rank] if devices else "none"
    return f"rank {worker.rank}: host {socket.gethostname()}, process {os.getpid()}, device {device}"


def _end_process() -> None:
    """Ends this process, in case it has not ended by itself; its ranks end with it."""
    time.sleep(ORDERLY_END_S)
    _log.error("a rank was lost and the engine core still waits for it: ending the engine core")
    os._exit(1)
