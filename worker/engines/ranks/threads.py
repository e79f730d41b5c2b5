"""Mixed into vLLM's worker class on CPU (worker_extension_cls): a rank's threads, changed between steps."""

from __future__ import annotations

import torch


class Threads:
    """Its methods are called by name through the engine core."""

    def set_threads(self, threads: int) -> None:
        """OpenMP threads of what this rank computes from now on."""
        torch._C.set_num_threads(threads)  # vLLM has made torch.set_num_threads a function that does nothing
