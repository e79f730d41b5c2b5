"""vLLM's CPU platform, made to run under vLLM's Ray executor.

vLLM refuses Ray on CPU because the platform names no Ray resource. This one names the custom resource that a CPU node's
slots are counted in, and puts in the worker and communicator classes that stages on other hosts need. Everything else
is vLLM's. Chosen by cpu_platform_plugin.py; never imported on a node with accelerators.
"""

from __future__ import annotations

import os
from typing import Any

from vllm.platforms.cpu import CpuPlatform

from megatoken.worker.engines.ranks.variables import DEVICE_VARIABLE

WORKER_CLASS = "megatoken.worker.engines.ranks.cpu_worker.StageCpuWorker"
COMMUNICATOR_CLASS = "megatoken.worker.engines.ranks.cpu_communicator.HostCpuCommunicator"


class RayCpuPlatform(CpuPlatform):  # type: ignore[misc]
    """A CPU slot is a device that Ray counts under a resource name of its own."""

    ray_device_key: str = os.environ.get(DEVICE_VARIABLE, "cpu_device")

    @classmethod
    def check_and_update_config(cls, vllm_config: Any) -> None:
        """Adjusts a configuration in place as vLLM does, with our worker class where none is asked for."""
        if vllm_config.parallel_config.worker_cls == "auto":
            vllm_config.parallel_config.worker_cls = WORKER_CLASS
        super().check_and_update_config(vllm_config)

    @classmethod
    def get_device_communicator_cls(cls) -> str:
        """The class that ranks exchange tensors with."""
        return COMMUNICATOR_CLASS
