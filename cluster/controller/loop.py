"""The control loop: observe -> decide -> apply (never waits) -> publish. The shell around cluster/decide/reconciler.py.

It runs as one asyncio task inside the controller's Ray actor; the Backend is called from one other thread, so that a
Ray that does not answer stops no gRPC stream. What was asked for and the fleet are in the state file; a new controller
reads it, adopts what runs, and carries on.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from megatoken.access.files import CredentialsFile
from megatoken.cluster.controller.desired_state import DesiredState
from megatoken.cluster.controller.devices import Devices
from megatoken.cluster.controller.events import EventLog
from megatoken.cluster.controller.links import Links
from megatoken.cluster.controller.monitoring.history import LOOK_S, History
from megatoken.cluster.controller.monitoring.rates import BestRates
from megatoken.cluster.controller.polls import Polls, Readable
from megatoken.cluster.controller.processes import STOP_GRACE_S, Processes
from megatoken.cluster.controller.publisher import Members, Publisher
from megatoken.cluster.controller.scaling import Autoscaler
from megatoken.cluster.controller.state import StateStore
from megatoken.cluster.controller.status import (
    model_statuses,
    node_statuses,
    process_statuses,
    replica_statuses,
)
from megatoken.cluster.decide.backend import Backend, BackendState
from megatoken.cluster.decide.fleet import (
    Action,
    ClusterEvent,
    Fleet,
    Limits,
    Observation,
    Phase,
    Release,
    Reserve,
    RollBack,
    Start,
    TellDrain,
    on_this_clock,
    ranks_by_node,
)
from megatoken.cluster.decide.launches import LOOPBACK, LaunchContext, worker_launch
from megatoken.cluster.decide.liveness import LivenessLimits
from megatoken.cluster.decide.processes import wanted_processes
from megatoken.cluster.decide.reconciler import reconcile
from megatoken.cluster.decide.replica import ReplicaState
from megatoken.cluster.inventory.topology import Inventory
from megatoken.cluster.secrets_keeper import SecretsKeeper
from megatoken.cluster.spec.cluster import ClusterSpec
from megatoken.errors import NotFoundError, UnavailableError
from megatoken.tls import ClientTls
from megatoken.v1 import control_pb2

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

BUSY_WAIT_S = 0.2  # between looks while something is on its way
TAIL_S = 5.0  # for a process to say its last lines
INSPECT_S = 5.0  # for the nodes of replicas that hang to say what their processes do
STUCK_S = 180.0  # no call of Ray that returns takes this long; past it the controller is started anew
STUCK_CHECK_S = 1.0
ROTATION_POLL_S = 0.1
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

    def __init__(
        self, settings: Settings, store: StateStore, secrets: SecretsKeeper, make_backend: Callable[[], Backend]
    ) -> None:
        self.settings = settings
        self.secrets = secrets
        self.store = store
        self._make_backend = make_backend
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="backend")
        self._tails = ThreadPoolExecutor(1, thread_name_prefix="tail")  # a process that does not answer delays no tick
        self._wake = asyncio.Event()
        self.desired_state = DesiredState(store, self.tell, self._wake.set)
        self.fleet: Fleet = on_this_clock(store.fleet(), time.monotonic())
        self.backend_state = BackendState(complete=False)
        self.inventory = Inventory()
        self.devices = Devices(self.desired_state, self.tell)
        self._rates = BestRates(store)
        self._autoscaler = Autoscaler(self.desired_state)
        self.history = History(store)
        self._history_due_s = 0.0
        self.events = EventLog(self.desired_state.spec.control.events_kept, time.time)
        self.publisher = Publisher(store, self.tell)
        self.credentials = CredentialsFile(secrets.own_path)
        self.links = Links(settings.tls, self.credentials.metadata)
        self.processes = Processes(secrets, self._in_thread, self.tell, self._survived)
        self._polls = Polls(self.links, self._readable, self._survived)
        self.closed = asyncio.Event()
        self.address = ""
        self.metrics_address = ""
        self._backend: Backend | None = None
        self._context = LaunchContext("", {}, "", settings.local)
        self._drains: dict[str, asyncio.Task[None]] = {}
        self._restored = bool(self.fleet.replicas)
        self.log_lines: deque[str] = deque(maxlen=1)
        self._turned_s = time.monotonic()
        """When a tick last ended, well or not."""
        self.on_event: Callable[[control_pb2.Event], None] = lambda _event: None
        self.on_tick: Callable[[float, bool], None] = lambda _seconds, _ok: None
        self.on_fault: Callable[[str], None] = lambda _what: None
        """Called, from any thread, with what failed and goes on: it is counted."""

    # -- the loop --

    async def run(self) -> None:
        """Ticks until the cluster was taken down. Raises when the backend cannot be made."""
        backend = self._backend = await self._in_thread(self._make_backend)
        self._turned_s = time.monotonic()
        self._context = LaunchContext(
            self.address,
            self.store.ports(),
            backend.ray_address,
            self.settings.local,
            backend.directory_of,
            self.secrets.current,
        )
        self.tell(ClusterEvent("controller.started", "controller", "carries on" if self._restored else "starts"))
        try:
            self._publish_snapshot()
        except Exception:  # the first tick does it again
            self._survived("publishing")
        loops = [asyncio.create_task(loop()) for loop in (self._polls.read_forever, self._polls.renew_forever)]
        turns = asyncio.create_task(self._turns(backend))
        try:
            while not turns.done():
                await asyncio.wait((turns,), timeout=STUCK_CHECK_S)
                if time.monotonic() - self._turned_s > STUCK_S:  # the next one finds what runs, and may find Ray well
                    raise RuntimeError(f"no tick ended within {STUCK_S:.0f} s: a call of Ray does not return")
            turns.result()
            if not self.settings.local:  # a local cluster's guard does it, and sooner
                await self._in_thread(backend.clean)
        finally:
            for loop in (turns, *loops):
                loop.cancel()
            await asyncio.gather(turns, *loops, *self._drains.values(), return_exceptions=True)
            await self.links.close()
            await self.events.publish(closed=True)
            self.closed.set()
            self._thread.shutdown(wait=False)
            self._tails.shutdown(wait=False)

    async def _turns(self, backend: Backend) -> None:
        """Ticks until the cluster is down."""
        while not await self._turn(backend):
            self._turned_s = time.monotonic()

    async def _turn(self, backend: Backend) -> bool:
        """One tick and the wait after it; says whether the cluster is down. An error is logged and the loop goes on."""
        began = time.monotonic()
        try:
            down = await self._tick(backend)
        except Exception:  # the loop that supervises: whatever went wrong, the next tick looks again
            self._survived("tick")
            self._count_turn(time.monotonic() - began, False)
            await asyncio.sleep(self.desired_state.spec.control.tick_s)
            return False
        self._count_turn(time.monotonic() - began, True)
        return down

    def _count_turn(self, seconds: float, ok: bool) -> None:
        try:
            self.on_tick(seconds, ok)
        except Exception:  # whoever looks on does not end the loop
            self._survived("metrics")

    def _survived(self, what: str) -> None:
        """Logs and counts an exception that ends nothing. Called where it is caught, from any thread."""
        logger.exception("%s failed", what)
        self.on_fault(what)

    async def _tick(self, backend: Backend) -> bool:
        await self._wait(backend)
        self.backend_state = await self._in_thread(backend.state)
        now = time.monotonic()
        self.devices.hear(self.backend_state.drivers)
        self.devices.take(self.backend_state.checks, self.backend_state.inventory)
        observation = await self._inspected(backend, self._observation())
        self._autoscaler.look(self.fleet, self.links.answering_routers(now), self.links.readings(), now)
        desired = self.desired_state.desired.on_nodes(self.inventory)
        plan = reconcile(desired, self.fleet, observation, self._limits(), now)
        self.store.save_fleet(plan.fleet)  # a disk that takes nothing leaves all as it was, to be decided anew
        self.devices.judge(self.fleet, plan.fleet)
        self.fleet = plan.fleet
        for event in plan.events:
            self.tell(event)
        self._publish_snapshot()  # before anything is done: who drains or failed is told even if an action fails
        await self._tell_secrets(backend, now)
        await self._apply(backend, plan.actions)
        for check in self.devices.to_check(self.inventory, self.fleet):
            await self._in_thread(functools.partial(backend.check_device, check))
        self.desired_state.settle_updates(self.fleet)
        processes_left = await self._supervise(backend, now)
        self._publish_snapshot()
        await self.events.publish()
        self._note_history()
        held = any(seen.holds_something for seen in self.backend_state.replicas.values())
        live = any(replica.live for replica in self.fleet.replicas)
        return self.desired_state.stopping and self.backend_state.complete and not (held or live or processes_left)

    def preview(self, spec: ClusterSpec) -> list[str]:
        """What the next tick would do if `spec` were wanted; changes nothing."""
        desired = replace(self.desired_state.desired, models=spec.models).on_nodes(self.inventory)
        plan = reconcile(desired, self.fleet, self._observation(), self._limits(), time.monotonic())
        return [f"{event.subject}: {event.message}" for event in plan.events]

    def _note_history(self) -> None:
        if time.monotonic() < self._history_due_s:
            return
        now = time.monotonic()
        self._history_due_s = now + LOOK_S
        kinds = {replica.id: replica.placement.ranks[0].kind for replica in self.fleet.replicas}
        try:
            self._rates.look(self.fleet, self.links.readings(), self.links.sample, now, time.time())
            self.history.look(self.status(), kinds, self.links.routers.values())
        except Exception:  # a disk that takes nothing loses minutes of the past, and nothing else
            self._survived("history")

    async def _wait(self, backend: Backend) -> None:
        """Waits for a change that Ray reports, an order, or the time of the next tick, whichever comes first."""
        tick_s = BUSY_WAIT_S if self._moving() else self.desired_state.spec.control.tick_s
        until = time.monotonic() + tick_s
        while not self._wake.is_set() and (left_s := until - time.monotonic()) > 0:
            if await self._in_thread(lambda: backend.wait_change(min(left_s, BUSY_WAIT_S))):
                break
        self._wake.clear()

    def _observation(self) -> Observation:
        desired = self.desired_state.desired
        nodes = tuple(
            replace(node, draining=node.host in desired.drained_nodes) for node in self.backend_state.inventory.nodes
        )
        self.inventory = self.devices.marked(Inventory(nodes))
        now, limits, liveness = time.monotonic(), self._liveness_limits(), self.links.liveness
        replicas = {
            replica_id: replace(
                seen,
                unfinished=self.links.unfinished.get(replica_id),
                hang=liveness.hang(replica_id, limits, now) if seen.phase is Phase.SERVING else None,
                lease_until_s=liveness.lease_until_s(replica_id, limits, now),
            )
            for replica_id, seen in self.backend_state.replicas.items()
        }
        return Observation(self.inventory, replicas, self.backend_state.complete)

    async def _inspected(self, backend: Backend, observation: Observation) -> Observation:
        """With what the processes of replicas that hang are doing, so that the reason can name the one to blame."""
        hung = [
            replica
            for replica in self.fleet.replicas
            if replica.live and replica.id in observation.replicas and observation.replicas[replica.id].hang
        ]
        if not hung:
            return observation
        try:
            parts = await self._in_thread(lambda: backend.inspect(hung, INSPECT_S))
        except Exception:
            self._survived("look at what hangs")
            return observation
        found = dict(observation.replicas)
        for replica in hung:
            seen = found[replica.id]
            if seen.hang is not None:
                found[replica.id] = replace(seen, hang=replace(seen.hang, parts=parts.get(replica.id, ())))
        return replace(observation, replicas=found)

    def _limits(self) -> Limits:
        control = self.desired_state.spec.control
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
                case RollBack(model, _):
                    self.desired_state.roll_back(model)
        calls = [action for action in actions if isinstance(action, Reserve | Start | Release)]
        if calls:
            await self._in_thread(lambda: self._call_all(backend, calls))
        live = {replica.id for replica in self.fleet.replicas if replica.live}
        self._drains = {replica: task for replica, task in self._drains.items() if replica in live}

    def _call_all(self, backend: Backend, actions: list[Reserve | Start | Release]) -> None:
        """Each by itself: one that raises takes no other along, and the next tick asks for it again."""
        for action in actions:
            try:
                self._call(backend, action)
            except Exception:
                self._survived(f"{type(action).__name__.lower()} of a replica")

    def _call(self, backend: Backend, action: Reserve | Start | Release) -> None:
        match action:
            case Reserve(replica):
                backend.reserve(replica)
            case Start(replica):
                model = self.desired_state.model_of(replica)
                if model is not None:
                    group = backend.placement_group_id(replica.id)
                    ranks = ranks_by_node(self.fleet.replicas)
                    near = max(ranks[node] for node in replica.placement.nodes)
                    launch = worker_launch(
                        replica,
                        model,
                        self.desired_state.spec,
                        self.inventory,
                        self._context,
                        group,
                        near,
                        self.fleet.replicas,
                    )
                    backend.start_replica(replica, launch)
            case Release(replica_id):
                backend.release(replica_id, STOP_GRACE_S)

    async def _supervise(self, backend: Backend, now: float) -> bool:
        """Starts and stops routers, edges and agents; says whether any is left."""
        if not self.backend_state.complete:
            return True
        live = any(replica.live for replica in self.fleet.replicas)
        stopping = self.desired_state.stopping
        wanted = (
            ()
            if stopping and not live
            # An edge has a model's tokenizer: it is exchanged for one of new weights when those have come up.
            else wanted_processes(self.desired_state.proven_spec(self.fleet), self.inventory, self.fleet, self._context)
        )
        return await self.processes.supervise(backend, self.backend_state, wanted, now, stopping=stopping)

    async def rotate_tokens(self) -> str:
        """Makes every token anew; the operator's, once all processes show theirs. Raises UnavailableError."""
        self.secrets.rotate()
        self.tell(ClusterEvent("tokens.rotating", "cluster", "a new secret is made; the old one ends soon", "operator"))
        while self.secrets.current.rotating and self.secrets.current.presented:
            self._wake.set()
            await asyncio.sleep(ROTATION_POLL_S)
        return self.secrets.operator_token

    async def _tell_secrets(self, backend: Backend, now: float) -> None:
        if self.backend_state.complete:
            await self.processes.tell_secrets(backend, self.backend_state, now)
            self._context = replace(self._context, secrets=self.secrets.current)

    def _moving(self) -> bool:
        """Whether something is on its way, so that the next look should come soon."""
        if self.desired_state.stopping or not self.backend_state.complete:
            return True
        if any(replica.state in LIVE_STATES_MOVING for replica in self.fleet.replicas):
            return True
        return self.processes.moving

    # -- what others see --

    def _publish_snapshot(self) -> None:
        members = Members(
            self.fleet,
            self.desired_state.spec.models,
            self.inventory,
            self.backend_state.processes,
            complete=self.backend_state.complete,
        )
        self.publisher.publish(members)

    def tell(self, event: ClusterEvent) -> None:
        """Writes an event down, for followers and the log."""
        self.on_event(self.events.add(event))
        logger.info("%s %s: %s", event.kind, event.subject, event.message)

    def status(self) -> control_pb2.ClusterStatus:
        """Everything there is to say, as of the last tick."""
        phases = {name: seen.start_phase for name, seen in self.backend_state.replicas.items()}
        now, readings = time.monotonic(), replace(self.links.readings(), start_phases=phases)
        models = {model.name: model for model in self.desired_state.spec.models}
        replicas = replica_statuses(self.fleet, models, self.inventory, readings, now)
        return control_pb2.ClusterStatus(
            cluster=self.settings.cluster,
            generation=self.desired_state.desired.generation,
            membership_epoch=self.publisher.versions.current.epoch,
            membership_version=self.publisher.versions.current.version,
            unix_s=time.time(),
            controller=self.address,
            ray_address=self._context.ray_address,
            metrics_address=self.metrics_address,
            nodes=node_statuses(self.inventory, self.fleet, self.desired_state.desired.drained_nodes),
            models=model_statuses(
                self.fleet, self.desired_state.spec.models, replicas, readings, self._autoscaler.messages, now
            ),
            replicas=replicas,
            processes=process_statuses(self.processes.records, self.backend_state.processes, self.inventory),
            throughput=self.links.sample,
            efficiency=self._rates.messages(),
        )

    def _liveness_limits(self) -> LivenessLimits:
        control = self.desired_state.spec.control
        return LivenessLimits(control.worker_lease_s, control.hang_s, control.probe_s)

    def _readable(self) -> Readable:
        routers, agents = (self.processes.addresses(kind, self.backend_state) for kind in ("router", "agent"))
        return Readable(self.fleet.replicas, routers, agents, self._liveness_limits())

    async def tail(self, name: str, lines: int) -> str:
        """The last lines of a replica or process. Raises NotFoundError."""
        backend = self._backend
        if backend is None:
            raise UnavailableError("the controller has not reached Ray yet")
        names = [name, *(full for full in self.backend_state.processes if full.partition(".")[0] == name)]
        for candidate in names:
            if candidate in self.backend_state.replicas or candidate in self.backend_state.processes:
                try:
                    loop = asyncio.get_running_loop()
                    return await loop.run_in_executor(self._tails, backend.tail, candidate, lines, TAIL_S)
                except KeyError:
                    raise UnavailableError(f"{candidate} has not started yet") from None
        known = ", ".join(sorted({*self.backend_state.replicas, *self.backend_state.processes})) or "none"
        raise NotFoundError("name", name, f"one of: {known}; no name for the controller")

    async def _in_thread(self, call: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)


def bind_host(spec: ClusterSpec, node_address: str) -> str:
    """Where the controller's server binds: as the spec says, else by HOST_RULE."""
    if spec.control.host is not None:
        return spec.control.host
    return LOOPBACK if spec.ray.address == "local" else node_address
