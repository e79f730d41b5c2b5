"""vLLM's multiprocessing executor: the ranks of a replica inside one node, without Ray.

Ranks are children of the engine core and die with it (worker/engines/vllm/plugins.py). Which devices they have is the
worker's own environment, so they are the planned ones. On CPU they are forked, and import nothing anew.
"""

from __future__ import annotations

from vllm.v1.executor.multiproc_executor import MultiprocExecutor

from megatoken.worker.engines.ranks.executor import MortalExecutor


class LocalExecutor(MortalExecutor, MultiprocExecutor):  # type: ignore[misc]
    """Runs one rank per planned device of this node."""

    def lost_ranks(self) -> list[int]:
        return [worker.rank for worker in getattr(self, "workers", ()) if not worker.proc.is_alive()]
