"""What ranks do beside vLLM's own start: rank 0 tells its phases, and the first rank of a node checks weights."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from megatoken.process.start_phase import begin_phase
from megatoken.worker.engines import weights
from megatoken.worker.engines.hub_snapshot import snapshot_of
from megatoken.worker.models import notes_directory

if TYPE_CHECKING:
    from vllm.config import VllmConfig

PHASES: Final = {
    "load_model": "weights",
    "determine_available_memory": "compile",  # the profiling run, in which torch.compile compiles
    "compile_or_warm_up_model": "warm up",
}


def watch_ranks() -> None:
    """Acts on every rank that this process, or one forked from it, makes from now on."""
    from vllm.v1.worker.worker_base import WorkerBase

    made = WorkerBase.__init__
    if hasattr(made, "__wrapped__"):
        return

    @functools.wraps(made)
    def init(self: Any, *arguments: Any, **options: Any) -> None:
        made(self, *arguments, **options)
        if self.local_rank == 0:
            self.load_model = _before(self.load_model, lambda: check_weights(self.vllm_config))
        if self.rank == 0:
            for method, phase in PHASES.items():
                setattr(self, method, _before(getattr(self, method), functools.partial(begin_phase, phase)))

    WorkerBase.__init__ = init


def check_weights(config: VllmConfig) -> None:
    """Raises RequestError where this node's files are not those of the worker's node."""
    expected = json.loads(os.environ.get(weights.VARIABLE) or "{}")
    directory = snapshot_of(config) if expected else None
    if directory is not None:
        found = weights.manifest_of(directory, notes_directory()) if directory.is_dir() else {}
        weights.check_same(str(directory), found, expected["files"], expected["whose"])


def _before(method: Callable[..., Any], act: Callable[[], None]) -> Callable[..., Any]:
    @functools.wraps(method)
    def both(*arguments: Any, **options: Any) -> Any:
        act()
        return method(*arguments, **options)

    return both
