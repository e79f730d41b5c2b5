"""Entry point `vllm.general_plugins`, run in every process that vLLM starts: ties its life to its parent's.

It also lets a spawned engine core carry resumed requests on, and rank 0 tell how its start goes. It acts only below a
worker of ours (the worker names itself in OWNER_VARIABLE) and never in the worker itself. Forked children skip vLLM's
plugins, which ran before the fork; `tie_forks` covers those. Imports nothing heavy itself.
"""

from __future__ import annotations

import os
from typing import Final

from megatoken.process.tree import die_with_parent

OWNER_VARIABLE: Final = "MEGATOKEN_WORKER_PID"


def tie_to_parent() -> None:
    """Has the kernel kill this process when its parent ends, if a worker of ours started it."""
    owner = os.environ.get(OWNER_VARIABLE)
    # Ray's own children are Ray's to end: their parent is the raylet. (Other processes below an actor inherit the
    # variable as well, an engine core among them.)
    under_raylet = os.environ.get("RAY_RAYLET_PID") == str(os.getppid())
    if owner is None or owner == str(os.getpid()) or under_raylet:
        return
    die_with_parent()
    from megatoken.worker.engines.ranks.rank_start import watch_ranks
    from megatoken.worker.engines.vllm.resume import install

    install()
    watch_ranks()


def tie_forks() -> None:
    """Ties every process that this one forks from now on."""
    os.register_at_fork(after_in_child=die_with_parent)
