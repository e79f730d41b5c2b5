"""The Backend that is Ray: placement groups, named detached actors, and what their watches report.

One watch per actor is always on its way; `look` collects those that came back and asks again. A controller that
restarts finds the actors and placement groups by name and adopts them. Decides nothing.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError
from ray.util import list_named_actors, placement_group, placement_group_table, remove_placement_group
from ray.util.placement_group import get_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from megatoken.cluster.decide.backend import BackendState, ProcessLaunch, ProcessObservation
from megatoken.cluster.decide.device_check import DeviceCheck
from megatoken.cluster.decide.device_health import Place
from megatoken.cluster.decide.exit_cause import ExitCause
from megatoken.cluster.decide.fleet import Phase, Replica, ReplicaObservation, Reservation, WorkerFacts
from megatoken.cluster.decide.liveness import PartSeen
from megatoken.cluster.inventory.topology import CPU_KIND, Inventory
from megatoken.cluster.ray.actors import (
    PROCESS_PREFIX,
    REPLICA_PREFIX,
    ProcessActor,
    namespace_of,
    processes_of,
    remove_directory,
)
from megatoken.cluster.ray.device_tasks import check_device
from megatoken.cluster.ray.driver_poll import DriverPoll
from megatoken.cluster.ray.inventory import CPU_RESOURCE, inventory_of
from megatoken.cluster.runtime_dirs import node_directory
from megatoken.process.tag import replica_tag

logger = logging.getLogger(__name__)

NODE_ID_LABEL = "ray.io/node-id"
ADOPT_S = 10.0  # limit on the first answers of actors that a restarted controller adopts
STOP_MARGIN_S = 5.0  # past the grace of a stop, before its actor is killed
CONCURRENT_CALLS = 8  # of one ProcessActor: a watch, a tail, a stop, and room


@dataclass
class _Handle:
    """One actor that we watch."""

    name: str
    actor: Any
    node: str = ""
    version: int = -1
    phase: Phase = Phase.STARTING
    facts: Mapping[str, Any] | None = None
    start_phase: str = ""
    reason: str = ""
    cause: ExitCause = ExitCause.UNKNOWN
    watch: Any = None
    stopping: Any = None
    kill_at_s: float | None = None


class RayBackend:
    """Used from one thread, but for `tail`."""

    def __init__(self, cluster: str, runtime_root: Path) -> None:
        context = ray.get_runtime_context()
        self.cluster = cluster
        self.ray_address = str(context.gcs_address)
        self.head_node = str(context.get_node_id())
        self._namespace = namespace_of(cluster)
        self._runtime_root = runtime_root
        self._actor_class = ray.remote(ProcessActor)
        self._handles: dict[str, _Handle] = {}
        self._groups: dict[str, Any] = {}
        self._checks: dict[Place, Any] = {}
        self._drivers = DriverPoll()
        self._inventory = Inventory()
        self._adopt()

    # -- looking --

    def directory_of(self, node: str) -> Path:
        known = self._inventory.node(node)
        return node_directory(self._runtime_root, self.cluster, known.host if known else node)

    def wait_change(self, wait_s: float) -> bool:
        return self._collect(wait_s)

    def state(self) -> BackendState:
        self._collect(0.0)
        self._finish_stops()
        try:
            self._inventory = inventory_of(ray.nodes())
            groups = self._group_states()
        except (RayError, RuntimeError, ConnectionError, TimeoutError) as error:
            logger.warning("Ray did not answer: %s", error)
            return BackendState(self._inventory, {}, {}, complete=False)
        replicas: dict[str, ReplicaObservation] = {}
        processes: dict[str, ProcessObservation] = {}
        for name, handle in self._handles.items():
            if name.startswith(PROCESS_PREFIX):
                seen = ProcessObservation(handle.phase, handle.facts, handle.reason, handle.node)
                processes[name.removeprefix(PROCESS_PREFIX)] = seen
        ids = {name.removeprefix(REPLICA_PREFIX) for name in self._handles if name.startswith(REPLICA_PREFIX)}
        for replica_id in ids | groups.keys():
            replicas[replica_id] = self._replica(replica_id, groups.get(replica_id, Reservation.NONE))
        return BackendState(self._inventory, replicas, processes, self._checked(), self._drivers.state(self._inventory))

    def _replica(self, replica_id: str, reservation: Reservation) -> ReplicaObservation:
        handle = self._handles.get(REPLICA_PREFIX + replica_id)
        if handle is None:
            return ReplicaObservation(reservation)
        facts = worker_facts(handle.facts) if handle.facts else None
        return ReplicaObservation(
            reservation, handle.phase, facts, handle.reason, handle.cause, start_phase=handle.start_phase
        )

    def _collect(self, wait_s: float) -> bool:
        """Takes the watches that came back and asks again; waits at most `wait_s` for the first. Says if one came."""
        watches = {handle.watch: handle for handle in self._handles.values() if handle.watch is not None}
        if not watches:
            time.sleep(wait_s)
            return False
        done, _ = ray.wait(list(watches), num_returns=1, timeout=wait_s)
        if done and len(watches) > 1:
            done, _ = ray.wait(list(watches), num_returns=len(watches), timeout=0)
        for reference in done:
            self._take(watches[reference], reference)
        return bool(done)

    def _take(self, handle: _Handle, reference: Any) -> None:
        try:
            state = ray.get(reference, timeout=5)
        except ActorUnavailableError:  # not dead to Ray: it may only be out of reach for a moment
            handle.watch = handle.actor.watch.remote(handle.version)
            return
        except RayActorError as error:
            handle.watch, handle.phase = None, Phase.EXITED
            if not handle.reason or handle.facts is not None:
                handle.cause, handle.reason = _why_actor_died(error)
            return
        except RayError as error:  # an error of the actor itself: it cannot be used
            handle.watch, handle.phase, handle.reason = None, Phase.EXITED, f"actor failed: {_first_line(error)}"
            handle.cause = ExitCause.START_FAILED if handle.facts is None else ExitCause.ACTOR_LOST
            return
        handle.version, handle.phase = int(state["version"]), Phase(state["phase"])
        handle.facts = state["facts"] if state["facts"] is not None else handle.facts
        handle.start_phase = str(state.get("start_phase", ""))
        handle.reason, handle.cause = str(state["reason"]), ExitCause(state.get("cause", ExitCause.UNKNOWN))
        handle.watch = None if handle.phase is Phase.EXITED else handle.actor.watch.remote(handle.version)

    def _group_states(self) -> dict[str, Reservation]:
        prefix = self._group_name("")
        states: dict[str, Reservation] = {}
        for entry in placement_group_table().values():
            name = str(entry["name"])
            if not name.startswith(prefix) or entry["state"] == "REMOVED":
                continue
            created = entry["state"] == "CREATED"
            states[name.removeprefix(prefix)] = Reservation.GRANTED if created else Reservation.PENDING
        return states

    # -- acting --

    def reserve(self, replica: Replica) -> None:
        if self._group(replica.id) is not None:  # also one that an earlier controller asked for
            return
        ranks = replica.placement.ranks
        bundles = [{CPU_RESOURCE if rank.kind == CPU_KIND else "GPU": 1.0} for rank in ranks]
        self._groups[replica.id] = placement_group(
            bundles,
            name=self._group_name(replica.id),
            lifetime="detached",
            bundle_label_selector=[{NODE_ID_LABEL: rank.node} for rank in ranks],
        )

    def start_replica(self, replica: Replica, launch: ProcessLaunch) -> None:
        group = self._group(replica.id)
        if group is None:
            return
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)
        self._start(REPLICA_PREFIX + replica.id, launch, strategy)

    def start_process(self, launch: ProcessLaunch) -> None:
        strategy = NodeAffinitySchedulingStrategy(launch.node, soft=False)
        self._start(PROCESS_PREFIX + launch.name, launch, strategy)

    def _start(self, name: str, launch: ProcessLaunch, strategy: Any) -> None:
        if name in self._handles:
            return
        payload = {
            "name": launch.name,
            "program": launch.program,
            "config": launch.settings,
            "directory": launch.directory,
            "env": dict(launch.env),
            "credentials": launch.credentials,
        }
        actor = self._actor_class.options(
            name=name,
            namespace=self._namespace,
            lifetime="detached",
            num_cpus=0,
            max_restarts=0,
            max_concurrency=CONCURRENT_CALLS,
            scheduling_strategy=strategy,
        ).remote(payload)
        self._handles[name] = _Handle(name, actor, launch.node, watch=actor.watch.remote(-1))

    def release(self, replica_id: str, grace_s: float) -> None:
        name = REPLICA_PREFIX + replica_id
        if name in self._handles:
            self._stop(self._handles[name], grace_s)
            return
        group = self._group(replica_id)
        if group is not None:
            remove_placement_group(group)
            self._groups.pop(replica_id, None)

    def stop_process(self, name: str, grace_s: float) -> None:
        handle = self._handles.get(PROCESS_PREFIX + name)
        if handle is not None:
            self._stop(handle, grace_s)

    def _stop(self, handle: _Handle, grace_s: float) -> None:
        if handle.stopping is None:
            handle.stopping = handle.actor.stop.remote(grace_s)
            handle.kill_at_s = time.monotonic() + grace_s + STOP_MARGIN_S

    def _finish_stops(self) -> None:
        """Kills the actors whose child has ended, or that did not answer in time."""
        for handle in [handle for handle in self._handles.values() if handle.stopping is not None]:
            done, _ = ray.wait([handle.stopping], timeout=0)
            late = handle.kill_at_s is not None and time.monotonic() > handle.kill_at_s
            if not (done or late):
                continue
            ray.kill(handle.actor, no_restart=True)
            self._handles.pop(handle.name)
            if handle.name.startswith(REPLICA_PREFIX):
                self.release(handle.name.removeprefix(REPLICA_PREFIX), 0.0)

    def tail(self, name: str, lines: int, timeout_s: float) -> str:
        handle = self._handles.get(REPLICA_PREFIX + name) or self._handles[PROCESS_PREFIX + name]
        return str(ray.get(handle.actor.tail.remote(lines), timeout=timeout_s))

    def give_credentials(self, texts: Mapping[str, str], timeout_s: float) -> list[str]:
        calls = {}
        for name, text in texts.items():
            handle = self._handles.get(REPLICA_PREFIX + name) or self._handles.get(PROCESS_PREFIX + name)
            if handle is not None:
                calls[handle.actor.give_credentials.remote(text)] = name
        if not calls:
            return []
        done, _ = ray.wait(list(calls), num_returns=len(calls), timeout=timeout_s)
        return [calls[reference] for reference in done if _succeeded(reference)]

    def inspect(self, replicas: Sequence[Replica], timeout_s: float) -> dict[str, tuple[PartSeen, ...]]:
        by_node: dict[str, list[str]] = {}
        for replica in replicas:
            for node in replica.placement.nodes:
                by_node.setdefault(node, []).append(replica.id)

        def tag(node: str, name: str) -> str:
            return replica_tag(self.directory_of(node).parent, name)

        calls = {}
        for node, names in by_node.items():
            strategy = NodeAffinitySchedulingStrategy(node, soft=False)
            calls[processes_of.options(scheduling_strategy=strategy).remote([tag(node, name) for name in names])] = node
        done, _ = ray.wait(list(calls), num_returns=len(calls), timeout=timeout_s)
        answered = [reference for reference in done if _succeeded(reference)]
        parts: dict[str, list[PartSeen]] = {replica.id: [] for replica in replicas}
        for reference, node in calls.items():
            found = ray.get(reference) if reference in answered else {}
            for name in by_node[node]:
                seen = [PartSeen(node, part, pid, state) for part, pid, state in found.get(tag(node, name), ())]
                parts[name] += seen if reference in answered else [PartSeen(node)]
        return {name: tuple(found) for name, found in parts.items()}

    def check_device(self, check: DeviceCheck) -> None:
        if check.place not in self._checks:
            strategy = NodeAffinitySchedulingStrategy(check.place[0], soft=False)
            self._checks[check.place] = check_device.options(scheduling_strategy=strategy).remote(check)

    def _checked(self) -> dict[Place, str]:
        """Results of the checks that ended since the last look."""
        places = {reference: place for place, reference in self._checks.items()}
        ended, _ = ray.wait(list(places), num_returns=len(places), timeout=0) if places else ((), ())
        found = {}
        for reference in ended:
            try:
                found[places[reference]] = str(ray.get(reference))
            except RayError as error:
                found[places[reference]] = f"it did not end: {str(error).splitlines()[0]}"
            del self._checks[places[reference]]
        return found

    def placement_group_id(self, replica_id: str) -> str:
        group = self._group(replica_id)
        return str(group.id.hex()) if group is not None else ""

    def clean(self) -> None:
        references = []
        for node in self._inventory.nodes:
            if node.alive:
                path = self.directory_of(node.id)
                strategy = NodeAffinitySchedulingStrategy(node.id, soft=False)
                references.append(remove_directory.options(scheduling_strategy=strategy).remote(str(path)))
        if references:
            ray.wait(references, num_returns=len(references), timeout=10)

    # -- adopting --

    def _adopt(self) -> None:
        """Takes up the actors and placement groups that an earlier controller of this cluster left."""
        for entry in list_named_actors(all_namespaces=True):
            name = entry["name"]
            if entry["namespace"] != self._namespace or not name.startswith((REPLICA_PREFIX, PROCESS_PREFIX)):
                continue
            actor = ray.get_actor(name, namespace=self._namespace)
            self._handles[name] = _Handle(name, actor, watch=actor.watch.remote(-1))
        deadline = time.monotonic() + ADOPT_S
        while any(handle.version < 0 and handle.watch is not None for handle in self._handles.values()):
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                break
            self._collect(min(left_s, 0.5))
        if self._handles:
            logger.info("adopted %d running actors", len(self._handles))

    def _group(self, replica_id: str) -> Any:
        if replica_id not in self._groups:
            try:
                self._groups[replica_id] = get_placement_group(self._group_name(replica_id))
            except ValueError:
                return None
        return self._groups[replica_id]

    def _group_name(self, replica_id: str) -> str:
        return f"{self._namespace}/{replica_id}"


def worker_facts(ready: Mapping[str, Any]) -> WorkerFacts:
    """The part of a worker's ready line that the control plane keeps."""
    known = {entry.name for entry in dataclasses.fields(WorkerFacts)}
    facts = {name: value for name, value in ready.items() if name in known and value is not None}
    phases = tuple((str(name), float(seconds)) for name, seconds in ready.get("start_s", ()))
    weights = tuple(sorted((str(name), str(digest)) for name, digest in ready.get("weights", {}).items()))
    return WorkerFacts(**{**facts, "start_s": phases, "weights": weights})


def _why_actor_died(error: RayActorError) -> tuple[ExitCause, str]:
    """Ray itself only says it in words; nothing after this reads them."""
    text = str(error)
    if "node" in text.lower() and "died" in text.lower() and "worker" not in text.lower():
        return ExitCause.NODE_LOST, "its node died"
    return ExitCause.ACTOR_LOST, f"its actor died: {_first_line(error)}"


def _succeeded(reference: Any) -> bool:
    """Whether a call that came back came back well."""
    try:
        ray.get(reference, timeout=0)
    except RayError as error:
        logger.warning("an actor did not do as asked: %s", _first_line(error))
        return False
    return True


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]
