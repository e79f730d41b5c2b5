"""Has rank 0 of a vLLM engine tell the phases of its start, in whichever process it is made."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final

from megatoken.process.start_phase import begin_phase

PHASES: Final = {
    "load_model": "weights",
    "determine_available_memory": "compile",  # the profiling run, in which torch.compile compiles
    "compile_or_warm_up_model": "warm up",
}


def tell_phases() -> None:
    """Acts on every rank that this process, or one forked from it, makes from now on."""
    from vllm.v1.worker.worker_base import WorkerBase

    made = WorkerBase.__init__
    if hasattr(made, "__wrapped__"):
        return

    @functools.wraps(made)
    def init(self: Any, *arguments: Any, **options: Any) -> None:
        made(self, *arguments, **options)
        if self.rank == 0:
            for method, phase in PHASES.items():
                setattr(self, method, _told(getattr(self, method), phase))

    WorkerBase.__init__ = init


def _told(method: Callable[..., Any], phase: str) -> Callable[..., Any]:
    @functools.wraps(method)
    def told(*arguments: Any, **options: Any) -> Any:
        begin_phase(phase)
        return method(*arguments, **options)

    return told
