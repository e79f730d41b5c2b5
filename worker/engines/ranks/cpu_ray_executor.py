"""The Ray executor on CPU nodes.

Two things differ there: a CPU slot has no device number for Ray to report, and a rank needs a few environment variables
before it imports vLLM (the platform is chosen, and threads are counted, at import). Chosen by placement.py.
"""

from __future__ import annotations

import os
import socket
from typing import Any

import psutil  # type: ignore[import-untyped,unused-ignore]
from vllm.v1.executor import ray_executor_v2

from megatoken.worker.engines.ranks.ray_executor import MarkedRank, MortalRayExecutor
from megatoken.worker.engines.ranks.variables import DEVICE_VARIABLE

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
)


class CpuRank(MarkedRank):
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
        if interface is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = interface
        super().initialize_worker(*arguments, **options)


class CpuRayExecutor(MortalRayExecutor):
    """Runs one rank per CPU slot of the replica's placement group."""

    rank_class = CpuRank

    def _build_runtime_env(self) -> dict[str, Any]:
        environment: dict[str, Any] = super()._build_runtime_env()
        variables = environment.setdefault("env_vars", {})
        for name in EARLY_VARIABLES:
            if name in os.environ:
                variables.setdefault(name, os.environ[name])
        return environment


def interface_of(address: str) -> str | None:
    """The name of the network interface that has this IP address, or None."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == address and entry.family in (socket.AF_INET, socket.AF_INET6) for entry in addresses):
            return str(name)
    return None
