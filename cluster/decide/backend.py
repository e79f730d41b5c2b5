"""What the controller needs from the system that runs things: the seam between deciding and Ray.

cluster/ray/backend.py is the real one; tests and the simulation have their own. All methods are called from one thread,
none may wait longer than it says, and each is idempotent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

from megatoken.cluster.decide.device_check import DeviceCheck
from megatoken.cluster.decide.device_health import DriverState, Place
from megatoken.cluster.decide.fleet import Phase, Replica, ReplicaObservation
from megatoken.cluster.decide.liveness import PartSeen
from megatoken.cluster.inventory.topology import Inventory
from megatoken.router.config import RouterConfig
from megatoken.router.edge.config import EdgeConfig
from megatoken.worker.config import WorkerConfig
from megatoken.worker.throughput.config import AgentConfig

ProgramConfig = WorkerConfig | RouterConfig | EdgeConfig | AgentConfig
WORKER, ROUTER = "megatoken.worker", "megatoken.router"
EDGE, AGENT = "megatoken.router.edge", "megatoken.worker.throughput"
PROGRAMS: Final[Mapping[type, str]] = {
    WorkerConfig: WORKER,
    RouterConfig: ROUTER,
    EdgeConfig: EDGE,
    AgentConfig: AGENT,
}


@dataclass(frozen=True, slots=True)
class ProcessObservation:
    """What is seen of a router, edge or agent."""

    phase: Phase = Phase.NONE
    facts: Mapping[str, Any] | None = None
    reason: str = ""
    node: str = ""


@dataclass(frozen=True, slots=True)
class BackendState:
    """One look at Ray. `complete` is False when Ray did not answer."""

    inventory: Inventory = field(default_factory=Inventory)
    replicas: Mapping[str, ReplicaObservation] = field(default_factory=dict)
    processes: Mapping[str, ProcessObservation] = field(default_factory=dict)
    checks: Mapping[Place, str] = field(default_factory=dict)
    """By device whose check ended since the last look: what is wrong with it, empty where nothing is."""
    drivers: Mapping[Place, DriverState] = field(default_factory=dict)
    """What drivers said of devices since the last look."""
    complete: bool = True


@dataclass(frozen=True, slots=True)
class ProcessLaunch:
    """A program to run on one node."""

    name: str
    config: ProgramConfig
    node: str
    directory: str
    """Runtime directory of the cluster on that node."""
    env: Mapping[str, str] = field(default_factory=dict)
    credentials: str = field(default="", repr=False)
    """What the program's credentials_file holds; empty: it has none."""

    @property
    def program(self) -> str:
        """The module that is run."""
        return PROGRAMS[type(self.config)]

    @property
    def settings(self) -> dict[str, Any]:
        """The configuration as its file has it: what was not set stays the program's own default.

        Equal configurations have equal files, however they came about: a spec that was read back says all of it.
        """
        return self.config.model_dump(mode="json", exclude_unset=True, exclude_defaults=True)


class Backend(Protocol):
    """Reserves devices, starts and ends processes, and looks."""

    ray_address: str
    head_node: str

    def directory_of(self, node: str) -> Path:
        """Where configs, logs and counters of the cluster lie on a node; the cluster's own directory is above it."""

    def wait_change(self, wait_s: float) -> bool:
        """Waits until a process reports a change, at most about `wait_s`; says whether one did."""

    def state(self) -> BackendState:
        """What there is now. Waits for nothing but Ray's own answer."""

    def reserve(self, replica: Replica) -> None:
        """Asks for the replica's devices, each bundle pinned to its node."""

    def start_replica(self, replica: Replica, launch: ProcessLaunch) -> None:
        """Starts the worker in the replica's reservation."""

    def release(self, replica_id: str, grace_s: float) -> None:
        """Ends the worker, after `grace_s` by force, and gives the devices back."""

    def start_process(self, launch: ProcessLaunch) -> None:
        """Starts a router, edge or agent."""

    def stop_process(self, name: str, grace_s: float) -> None:
        """Ends it, after `grace_s` by force."""

    def tail(self, name: str, lines: int, timeout_s: float) -> str:
        """The last lines that a replica or process wrote. Raises KeyError when there is none of that name.

        The one method that is called beside the others, from a thread of its own."""

    def give_credentials(self, texts: Mapping[str, str], timeout_s: float) -> list[str]:
        """Replaces the credentials files of running replicas and processes; returns those that took theirs in time."""

    def inspect(self, replicas: Sequence[Replica], timeout_s: float) -> dict[str, tuple[PartSeen, ...]]:
        """By replica: what its processes do, on all of its nodes; a node that does not answer in time says so."""

    def check_device(self, check: DeviceCheck) -> None:
        """Has a device loaded and looked at, unless that is under way; `state` tells once how it ended."""

    def placement_group_id(self, replica_id: str) -> str:
        """Ray's id of the replica's placement group; empty when it has none."""

    def clean(self) -> None:
        """Removes the runtime directories of every node."""
