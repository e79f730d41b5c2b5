"""One rank on a CPU node: vLLM's CPU worker, able to be a later pipeline stage.

Named by cpu_platform.py and made by vLLM inside each rank process.
"""

from __future__ import annotations

import os
from typing import Any

from vllm.distributed import get_pp_group
from vllm.v1.worker.cpu_worker import CPUWorker

from megatoken.worker.engines.ranks.cpu_communicator import SEGMENT_VARIABLE


class StageCpuWorker(CPUWorker):  # type: ignore[misc]
    """A CPU rank that can receive what the stage before it computed."""

    def init_device(self) -> None:
        """Names the shared memory of this replica on this host, then joins the process groups."""
        os.environ[SEGMENT_VARIABLE] = f"{self.vllm_config.instance_id}-{os.environ.get('VLLM_HOST_IP', '')}"
        super().init_device()

    def load_model(self, *arguments: Any, **options: Any) -> None:
        """Loads this rank's weights, and makes the buffers that a later stage receives into.

        vLLM makes them in the warm-up run, which its CPU worker skips in eager mode with a fixed KV cache size; the
        first step of a later stage then fails its own check.
        """
        super().load_model(*arguments, **options)
        runner = self.model_runner
        if not get_pp_group().is_first_rank and runner.intermediate_tensors is None:
            runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
                batch_size=runner.max_num_tokens, dtype=self.model_config.dtype, device=self.device
            )
