"""The Ray executor on CPU nodes.

Two things differ there: a CPU slot has no device number for Ray to report, and a rank needs a few environment variables
before it imports vLLM (the platform is chosen, and threads are counted, at import). Chosen by placement.py.
"""

from __future__ import annotations

import os
from typing import Any

from megatoken.process.interface import interface_of
from megatoken.process.uncollected import uncollected
from megatoken.worker.engines.ranks.ray_executor import PlacedRank, PlacedRayExecutor
from megatoken.worker.engines.ranks.variables import DEVICE_VARIABLE
from megatoken.worker.engines.ranks.waits import SHARED_MEMORY_VARIABLE, wait_asleep

with uncollected():
    from vllm.v1.executor import ray_executor_v2

# Copied from the engine core to its ranks, before they import anything.
EARLY_VARIABLES = (
    DEVICE_VARIABLE,
    "TORCH_COMPILE_DISABLE",
    "OMP_NUM_THREADS",  # Ray sets 1 for an actor that reserves no CPU
    "VLLM_CPU_OMP_THREADS_BIND",
    "VLLM_CPU_KVCACHE_SPACE",
    "VLLM_PLUGINS",
    "LD_PRELOAD",
    "PYTHONPATH",
    SHARED_MEMORY_VARIABLE,
)


class CpuRank(PlacedRank):
    """A rank process on a CPU slot."""

    def get_node_and_physical_gpu_ids(self) -> tuple[str, list[int]]:
        """The Ray node, and no device numbers: slots are only counted."""
        return ray_executor_v2.ray.get_runtime_context().get_node_id(), []

    def initialize_worker(self, *arguments: Any, **options: Any) -> None:
        """Completes a rank with its own node's address, which vLLM looks up through a route to the internet."""
        address = ray_executor_v2.ray.util.get_node_ip_address()
        os.environ["VLLM_HOST_IP"] = address
        # Left alone, Gloo takes the address that the host name resolves to, which is loopback on many machines; and the
        # engine core would hand on the name of its own node's interface.
        interface = interface_of(address)
        if interface:
            os.environ["GLOO_SOCKET_IFNAME"] = interface
        wait_asleep()
        super().initialize_worker(*arguments, **options)


class CpuRayExecutor(PlacedRayExecutor):
    """Runs one rank per CPU slot of the replica's placement group."""

    rank_class = CpuRank

    def _build_runtime_env(self) -> dict[str, Any]:
        environment: dict[str, Any] = super()._build_runtime_env()
        variables = environment.setdefault("env_vars", {})
        for name in EARLY_VARIABLES:
            if name in os.environ:
                variables.setdefault(name, os.environ[name])
        return environment
