"""vLLM's Ray executor (V2): the ranks of a replica that spans nodes, each in the bundle that was reserved for it.

Ray counts devices and hands them out by itself; a replica inside a node runs on the planned ones. So that no two share
a device, a rank takes the planned one here too, whatever Ray gave to its bundle. Used on nodes with accelerators as it
is, and by cpu_ray_executor.py on CPU nodes. Handed to vLLM as a class by placement.py, because vLLM's check for
pipeline parallelism accepts no path.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from ray.exceptions import RayActorError

from megatoken.process import start_phase
from megatoken.process.devices import visible_devices
from megatoken.process.host import host_of
from megatoken.process.uncollected import uncollected
from megatoken.worker.engines import weights
from megatoken.worker.engines.ranks.executor import MortalExecutor, mark_rank
from megatoken.worker.engines.ranks.rank_start import watch_ranks
from megatoken.worker.engines.ranks.variables import DEVICES_VARIABLE, REPLICA_VARIABLE, SOCKETS_VARIABLE

with uncollected():  # in the process of a rank this is where vLLM is imported
    from vllm.platforms import current_platform
    from vllm.v1.executor import ray_executor_v2
    from vllm.v1.executor.ray_executor_v2 import RayExecutorV2, RayWorkerProc


class PlacedRank(RayWorkerProc):  # type: ignore[misc]
    """A rank process on its planned device, that can be found as what it is."""

    def __init__(self, vllm_config: Any, rank: int, *arguments: Any, **options: Any) -> None:
        mark_rank(rank)
        watch_ranks()  # vLLM's plugins do it in other processes, and leave Ray's alone
        self._planned_rank = rank
        sockets = os.environ.get(SOCKETS_VARIABLE)
        if sockets:
            context = ray_executor_v2.ray.get_runtime_context()
            host = host_of(context.get_node_id(), context.get_node_labels())
            os.environ[SOCKETS_VARIABLE] = sockets_on(Path(sockets), host)
        super().__init__(vllm_config, rank, *arguments, **options)

    def get_node_and_physical_gpu_ids(self) -> tuple[str, list[int]]:
        """The Ray node, and the device that the plan has for this rank, as the driver numbers it."""
        planned = int(os.environ[DEVICES_VARIABLE].split(",")[self._planned_rank])
        device = current_platform.device_control_id_to_physical_device_id(visible_devices(os.environ, [planned])[0])
        return ray_executor_v2.ray.get_runtime_context().get_node_id(), [device]


class PlacedRayExecutor(MortalExecutor, RayExecutorV2):  # type: ignore[misc]
    """Runs one rank per bundle of the replica's placement group."""

    rank_class: type = PlacedRank

    def _init_executor(self) -> None:
        ray_executor_v2.RayWorkerProc = self.rank_class  # the executor names its rank class in no other place
        super()._init_executor()

    def lost_ranks(self) -> list[int]:
        return sorted(rank for rank, error in self._ends().items() if isinstance(error, RayActorError))

    def ended_ranks(self) -> list[int]:
        return sorted(self._ends())

    def _ends(self) -> dict[int, Exception | None]:
        """How each rank ended that has: by an error of its actor (it died), by one of its own, or with none."""
        ray = ray_executor_v2.ray
        handles = getattr(self, "ray_worker_handles", ())
        runs = {handle.run_ref: handle.rank for handle in handles if handle.run_ref is not None}
        found: dict[int, Exception | None] = {}
        for reference in ray.wait(list(runs), num_returns=len(runs), timeout=0)[0] if runs else ():
            try:
                ray.get(reference)
                found[runs[reference]] = None
            except Exception as error:  # whatever a rank raised
                found[runs[reference]] = error
        return found

    def _build_runtime_env(self) -> dict[str, Any]:
        environment: dict[str, Any] = super()._build_runtime_env()
        variables = environment.setdefault("env_vars", {})
        handed_on = (REPLICA_VARIABLE, DEVICES_VARIABLE, SOCKETS_VARIABLE, weights.VARIABLE, start_phase.VARIABLE)
        variables |= {name: os.environ[name] for name in handed_on if name in os.environ}
        return environment


def sockets_on(driver: Path, host: str) -> str:
    """Where ranks of a node have the sockets that they talk through: `driver` is where the engine core has them.

    Each node has a folder of its own beside it, named for the beginning of what the node is known by.
    """
    own = next((path for path in driver.parent.glob("*") if path.is_dir() and host.startswith(path.name)), None)
    return str(driver if driver.is_dir() else own or tempfile.gettempdir())
