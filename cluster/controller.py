"""The control loop: observe -> decide -> apply (never waits) -> publish. The shell around reconciler.py.

It runs as one asyncio task inside the controller's Ray actor; the Backend is called from one other thread, so that a
Ray that does not answer stops no gRPC stream. What was asked for and the fleet are in the state file; a new controller
reads it, adopts what runs, and carries on.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from cluster.backend import Backend, Look
from cluster.changes import changes_between, previous_specs
from cluster.events import EventLog
from cluster.fleet import (
    Action,
    Desired,
    Fleet,
    Happening,
    Limits,
    Observation,
    Release,
    Replica,
    Reserve,
    RollBack,
    Start,
    TellDrain,
)
from cluster.launches import LOOPBACK, Surroundings, worker_launch
from cluster.links import Links
from cluster.membership import Versions, content_of
from cluster.processes import Record, supervise, wanted_processes
from cluster.reconciler import reconcile
from cluster.replica import ReplicaState
from cluster.spec import ClusterSpec
from cluster.spec_model import ModelSpec
from cluster.state import StateStore
from cluster.status import Readings, model_statuses, node_statuses, process_statuses, replica_statuses
from cluster.topology import Inventory
from megatoken.errors import NotFoundError, RequestError, UnavailableError
from megatoken.tls import ClientTls
from megatoken.v1 import control_pb2, membership_pb2

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

BUSY_WAIT_S = 0.2  # between looks while something is on its way
POLL_S = 1.0  # between readings of loads and queues
STOP_GRACE_S = 5.0  # of a worker that has no request left
LIVE_STATES_MOVING = frozenset({ReplicaState.RESERVING, ReplicaState.STARTING, ReplicaState.DRAINING})


@dataclass(frozen=True, slots=True)
class Settings:
    """What the controller is started with."""

    cluster: str
    state_file: Path
    local: bool
    """One machine: processes may bind loopback."""
    host: str
    """Address its server binds."""
    advertise_host: str
    tls: ClientTls | None = None


class Controller:
    """Owns the fleet. Its methods run in its event loop; only the Backend is elsewhere."""

    def __init__(self, settings: Settings, store: StateStore, make_backend: Callable[[], Backend]) -> None:
        self.settings = settings
        self.store = store
        self._make_backend = make_backend
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="backend")
        spec = store.spec()
        if spec is None:
            raise ValueError("the state file holds no spec")
        self.spec: ClusterSpec = spec
        self.fleet: Fleet = store.fleet()
        self.records: Mapping[str, Record] = {}
        self.look = Look(complete=False)
        self.inventory = Inventory()
        self.events = EventLog(spec.control.events_kept, time.time)
        epoch = int(store.get("epoch") or time.time())
        self.versions = Versions(epoch, int(store.get("version") or 0))
        self.snapshot_changed = asyncio.Condition()
        self.links = Links(settings.tls)
        self.throughput: membership_pb2.ThroughputGroup | None = None
        self.closed = asyncio.Event()
        self.address = ""
        self.metrics_address = ""
        self._backend: Backend | None = None
        self._around = Surroundings("", {}, "", settings.local)
        self._wake = asyncio.Event()
        self._stopping = store.get("stopping") == "1"
        self._desired: Desired = store.desired(stopping=self._stopping)
        self._drains: dict[str, asyncio.Task[None]] = {}
        self._restored = bool(self.fleet.replicas)
        self.log_lines: deque[str] = deque(maxlen=1)
        self.on_event: Callable[[control_pb2.Event], None] = lambda _event: None
        self.on_tick: Callable[[float, bool], None] = lambda _seconds, _ok: None

    # -- the loop --

    async def run(self) -> None:
        """Ticks until the cluster was taken down. Raises when the backend cannot be made."""
        backend = self._backend = await self._in_thread(self._make_backend)
        self._around = Surroundings(self.address, self.store.ports(), backend.ray_address, self.settings.local)
        self.tell(Happening("controller.started", "controller", "carries on" if self._restored else "starts"))
        self._publish_snapshot()
        poll = asyncio.create_task(self._poll_forever())
        try:
            while not await self._turn(backend):
                pass
            if not self.settings.local:  # a local cluster's guard does it, and sooner
                await self._in_thread(backend.clean)
        finally:
            poll.cancel()
            await asyncio.gather(poll, *self._drains.values(), return_exceptions=True)
            await self.links.close()
            await self.events.publish(closed=True)
            self.closed.set()
            self._thread.shutdown(wait=False)

    async def _turn(self, backend: Backend) -> bool:
        """One tick and the wait after it; says whether the cluster is down. An error is logged and the loop goes on."""
        began = time.monotonic()
        try:
            down = await self._tick(backend)
        except Exception:  # the loop that supervises: whatever went wrong, the next tick looks again
            logger.exception("a tick failed")
            self.on_tick(time.monotonic() - began, False)
            await asyncio.sleep(self.spec.control.tick_s)
            return False
        self.on_tick(time.monotonic() - began, True)
        return down

    async def _tick(self, backend: Backend) -> bool:
        wait_s = 0.0 if self._wake.is_set() else BUSY_WAIT_S if self._moving() else self.spec.control.tick_s
        self._wake.clear()
        if wait_s > BUSY_WAIT_S:  # an order must not wait for a quiet look to end
            try:
                await asyncio.wait_for(self._wake.wait(), wait_s - BUSY_WAIT_S)
            except TimeoutError:
                pass
            wait_s = BUSY_WAIT_S
        self.look = await self._in_thread(lambda: backend.look(wait_s))
        now = time.monotonic()
        plan = reconcile(self._desired, self.fleet, self._observation(), self._limits(), now)
        self.fleet = plan.fleet
        self.store.save_fleet(plan.fleet)
        for happening in plan.happenings:
            self.tell(happening)
        await self._apply(backend, plan.actions)
        self._settle_updates()
        processes_left = await self._supervise(backend, now)
        self._publish_snapshot()
        await self.events.publish()
        held = any(seen.holds_something for seen in self.look.replicas.values())
        live = any(replica.live for replica in self.fleet.replicas)
        return self._stopping and self.look.complete and not (held or live or processes_left)

    def _observation(self) -> Observation:
        nodes = tuple(
            replace(node, draining=node.id in self._desired.drained_nodes) for node in self.look.inventory.nodes
        )
        self.inventory = Inventory(nodes)
        replicas = {
            replica_id: replace(seen, unfinished=self.links.unfinished.get(replica_id))
            for replica_id, seen in self.look.replicas.items()
        }
        return Observation(self.inventory, replicas, self.look.complete)

    def _limits(self) -> Limits:
        control = self.spec.control
        return Limits(
            reserve_timeout_s=control.reserve_timeout_s,
            backoff_s=control.restart_backoff_s,
            backoff_max_s=control.restart_backoff_max_s,
        )

    async def _apply(self, backend: Backend, actions: tuple[Action, ...]) -> None:
        """Hands every action on. Nothing here waits for its effect: the next look shows it."""
        for action in actions:
            match action:
                case TellDrain(replica):
                    if replica.id not in self._drains or self._drains[replica.id].done():
                        self._drains[replica.id] = asyncio.create_task(self.links.tell_drain(replica))
                case RollBack(model, reason):
                    self._roll_back(model, reason)
        calls = [action for action in actions if isinstance(action, Reserve | Start | Release)]
        if calls:
            await self._in_thread(lambda: self._call_all(backend, calls))
        live = {replica.id for replica in self.fleet.replicas if replica.live}
        self._drains = {replica: task for replica, task in self._drains.items() if replica in live}

    def _call_all(self, backend: Backend, actions: list[Reserve | Start | Release]) -> None:
        for action in actions:
            self._call(backend, action)

    def _call(self, backend: Backend, action: Reserve | Start | Release) -> None:
        match action:
            case Reserve(replica):
                backend.reserve(replica)
            case Start(replica):
                model = self._model_of(replica)
                if model is not None:
                    group = backend.placement_group_id(replica.id)
                    near = self._ranks_on(replica.placement.driver_node)
                    launch = worker_launch(replica, model, self.spec, self.inventory, self._around, group, near)
                    backend.start_replica(replica, launch)
            case Release(replica_id):
                backend.release(replica_id, STOP_GRACE_S)

    def _model_of(self, replica: Replica) -> ModelSpec | None:
        """The spec a replica was made from: the wanted one, or the one it is being updated from."""
        candidates = (self.spec.model(replica.model), self._desired.previous.get(replica.model))
        return next((model for model in candidates if model and model.revision == replica.revision), None)

    def _ranks_on(self, node: str) -> int:
        held = (replica.placement.ranks for replica in self.fleet.replicas if replica.live)
        return sum(1 for ranks in held for rank in ranks if rank.node == node)

    async def _supervise(self, backend: Backend, now: float) -> bool:
        """Starts and stops routers, edges and agents; says whether any is left."""
        live = any(replica.live for replica in self.fleet.replicas)
        wanted = (
            () if self._stopping and not live else wanted_processes(self.spec, self.inventory, self.fleet, self._around)
        )
        if not self.look.complete:
            return True
        decision = supervise(wanted, self.look.processes, self.records, now)
        self.records = decision.records
        for name, record in decision.changed:
            message = record.state + (f": {record.reason}" if record.reason else "")
            self.tell(Happening("process.state", name, message, "observed", {"kind": record.kind}))

        def call() -> None:
            for launch in decision.start:
                backend.start_process(launch)
            for name, grace_s in decision.stop:
                backend.stop_process(name, min(grace_s, STOP_GRACE_S) if self._stopping else grace_s)

        if decision.start or decision.stop:
            await self._in_thread(call)
        return bool(self.look.processes or decision.start)

    def _moving(self) -> bool:
        """Whether something is on its way, so that the next look should come soon."""
        if self._stopping or not self.look.complete:
            return True
        if any(replica.state in LIVE_STATES_MOVING for replica in self.fleet.replicas):
            return True
        return any(record.state not in ("READY", "FAILED") for record in self.records.values())

    # -- publishing --

    def _publish_snapshot(self) -> None:
        routers = [
            membership_pb2.RouterMember(router=name, address=str(seen.facts["address"]), node=seen.node)
            for name, seen in sorted(self.look.processes.items())
            if name.startswith("router") and seen.facts and "address" in seen.facts
        ]
        inventory = self.inventory if self.inventory.nodes else Inventory()
        offset_s = time.time() - time.monotonic()
        content = content_of(self.fleet, self.spec.models, inventory, routers, self.throughput, offset_s)
        if not self.look.complete and self.versions.current.version:
            content.routers.MergeFrom(self.versions.current.routers)
        if self.versions.offer(content):
            current = self.versions.current
            self.store.put(epoch=str(current.epoch), version=str(current.version))
            self._notify = asyncio.ensure_future(self._notify_watchers())

    async def _notify_watchers(self) -> None:
        async with self.snapshot_changed:
            self.snapshot_changed.notify_all()

    def set_throughput(self, group: membership_pb2.ThroughputGroup, why: str) -> None:
        """Publishes a new throughput group at once."""
        self.throughput = group
        self.tell(Happening("throughput.epoch", str(group.epoch), f"{len(group.members)} agents: {why}", "attendance"))
        self._publish_snapshot()

    def tell(self, happening: Happening) -> None:
        """Writes an event down, for followers and the log."""
        self.on_event(self.events.add(happening))
        logger.info("%s %s: %s", happening.kind, happening.subject, happening.message)

    def status(self) -> control_pb2.ClusterStatus:
        """Everything there is to say, as of the last tick."""
        now, readings = time.monotonic(), self._readings()
        models = {model.name: model for model in self.spec.models}
        replicas = replica_statuses(self.fleet, models, self.inventory, readings, now)
        return control_pb2.ClusterStatus(
            cluster=self.settings.cluster,
            generation=self._desired.generation,
            membership_epoch=self.versions.current.epoch,
            membership_version=self.versions.current.version,
            unix_s=time.time(),
            controller=self.address,
            ray_address=self._around.ray_address,
            metrics_address=self.metrics_address,
            nodes=node_statuses(self.inventory, self.fleet, self._desired.drained_nodes),
            models=model_statuses(self.fleet, self.spec.models, replicas, readings),
            replicas=replicas,
            processes=process_statuses(self.records, self.look.processes, self.inventory),
            throughput=self.links.sample,
        )

    def _readings(self) -> Readings:
        return self.links.readings()

    async def _poll_forever(self) -> None:
        while True:
            try:
                await self._poll()
            except Exception:  # supervises: readings are for people, and the next round reads again
                logger.exception("reading loads failed")
            await asyncio.sleep(POLL_S)

    async def _poll(self) -> None:
        await self.links.read_loads(self.fleet.replicas, time.monotonic())
        routers = self._addresses("router")
        agents = self._addresses("agent")
        await self.links.read_routers(routers)
        await self.links.read_throughput(agents.values())
        workers = {replica.facts.address for replica in self.fleet.replicas if replica.facts and replica.live}
        await self.links.keep_only({*workers, *routers.values(), *agents.values()})

    def _addresses(self, kind: str) -> dict[str, str]:
        found = {}
        for name, record in self.records.items():
            seen = self.look.processes.get(name)
            if record.kind == kind and record.state == "READY" and seen is not None and seen.facts:
                found[name] = str(seen.facts["address"])
        return found

    # -- orders --

    def apply(self, spec: ClusterSpec, *, dry_run: bool) -> tuple[int, list[str]]:
        """Makes `spec` the desired one; returns its generation and what changes. Raises SpecError."""
        changes = changes_between(self.spec, spec)
        if dry_run or not changes:
            return self._desired.generation, changes
        previous = previous_specs(self.spec, spec, self._desired.previous, self._settled_models())
        self._take_spec(spec, previous)
        self.tell(Happening("spec.applied", f"generation {self._desired.generation}", "; ".join(changes), "apply"))
        return self._desired.generation, changes

    def scale(self, model: str, replicas: int) -> int:
        """Asks for another number of replicas; returns the generation. Raises NotFoundError."""
        before = self.spec.model(model)
        if before is None:
            known = ", ".join(entry.name for entry in self.spec.models) or "none"
            raise NotFoundError("model", model, f"one of: {known}")
        if replicas != before.replicas:
            self._take_spec(self.spec.with_replicas(model, replicas), {})
            self.tell(Happening("model.scaled", model, f"{before.replicas} -> {replicas} replicas", "scale"))
        return self._desired.generation

    def drain_replica(self, replica_id: str, timeout_s: float | None) -> list[str]:
        """Takes one replica out of service; another replaces it. Raises NotFoundError."""
        replica = self.fleet.replica(replica_id)
        if replica is None or not replica.live:
            known = ", ".join(entry.id for entry in self.fleet.replicas if entry.live) or "none"
            raise NotFoundError("replica", replica_id, f"a live replica, one of: {known}")
        model = self.spec.model(replica.model)
        default_s = model.drain_timeout_s if model else STOP_GRACE_S
        self.store.drain_replica(replica_id, default_s if timeout_s is None else timeout_s)
        self._refresh_desired()
        self.tell(Happening("replica.drain", replica_id, "drain asked for", "drain"))
        return [replica_id]

    def drain_node(self, name: str, *, undo: bool) -> list[str]:
        """Takes a node out of service, or back. Raises NotFoundError and RequestError."""
        matches = [
            node
            for node in self.inventory.nodes
            if name in (node.name, node.address) or (len(name) >= 6 and node.id.startswith(name))
        ]
        alive = [node for node in matches if node.alive] or matches
        if not alive:
            known = ", ".join(node.title for node in self.inventory.nodes) or "none"
            raise NotFoundError("node", name, f"one of: {known}")
        if len(alive) > 1:
            raise RequestError("node", name, f"several nodes have it; use an id: {', '.join(n.id for n in alive)}")
        self.store.drain_node(alive[0].id, undo=undo)
        self._refresh_desired()
        self.tell(Happening("node.drain", alive[0].title, "back in service" if undo else "drain asked for", "drain"))
        on_node = (replica for replica in self.fleet.replicas if alive[0].id in replica.placement.nodes)
        return [] if undo else [replica.id for replica in on_node if replica.live]

    def shut_down(self, drain_timeout_s: float) -> None:
        """Drains everything and ends; `closed` is set when nothing is left."""
        for replica in self.fleet.replicas:
            if replica.live:
                self.store.drain_replica(replica.id, drain_timeout_s)
        self._stopping = True
        self.store.put(stopping="1")
        self._refresh_desired()
        self.tell(
            Happening("cluster.stopping", self.settings.cluster, f"drains, at most {drain_timeout_s:.0f} s", "down")
        )

    async def tail(self, name: str, lines: int) -> str:
        """The last lines of a replica or process. Raises NotFoundError."""
        backend = self._backend
        if backend is None:
            raise UnavailableError("the controller has not reached Ray yet")
        names = [name, *(full for full in self.look.processes if full.partition(".")[0] == name)]
        for candidate in names:
            if candidate in self.look.replicas or candidate in self.look.processes:
                try:
                    return await self._in_thread(lambda found=candidate: backend.tail(found, lines, 5.0))  # type: ignore[misc]
                except KeyError:
                    raise UnavailableError(f"{candidate} has not started yet") from None
        known = ", ".join(sorted({*self.look.replicas, *self.look.processes})) or "none"
        raise NotFoundError("name", name, f"one of: {known}; no name for the controller")

    def _take_spec(self, spec: ClusterSpec, previous: Mapping[str, ModelSpec | None]) -> None:
        self.store.put_spec(spec, previous)
        self.spec = spec
        self._refresh_desired()

    def _refresh_desired(self) -> None:
        self._desired = self.store.desired(stopping=self._stopping)
        self._wake.set()

    def _roll_back(self, model: str, reason: str) -> None:
        previous, present = self._desired.previous.get(model), self.spec.model(model)
        if previous is None or present is None:
            return
        restored = previous.model_copy(update={"replicas": present.replicas})
        self._take_spec(self.spec.with_model(restored), {model: None})
        logger.warning("model %s rolled back: %s", model, reason)

    def _settled_models(self) -> frozenset[str]:
        """Models whose wanted spec is known to work: a replica of it is READY, and none of another runs."""
        found = set()
        for model in self.spec.models:
            active = [replica for replica in self.fleet.of_model(model.name) if replica.active]
            ready = any(replica.state is ReplicaState.READY for replica in active)
            if ready and all(replica.revision == model.revision for replica in active):
                found.add(model.name)
        return frozenset(found)

    def _settle_updates(self) -> None:
        """Forgets what an update came from once all its replicas are exchanged."""
        done = {
            model.name
            for model in self.spec.models
            if model.name in self._desired.previous and model.name in self._settled_models()
        }
        if done:
            self.store.forget_previous(done)
            self._refresh_desired()
            for name in sorted(done):
                self.tell(Happening("model.updated", name, "every replica runs the new spec", "reconcile"))

    async def _in_thread(self, call: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)


def bind_host(spec: ClusterSpec, node_address: str) -> str:
    """Where the controller's server binds: as the spec says, else by HOST_RULE."""
    if spec.control.host is not None:
        return spec.control.host
    return LOOPBACK if spec.ray.address == "local" else node_address
