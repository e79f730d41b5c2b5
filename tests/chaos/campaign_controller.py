"""The controller killed at each of its steps and restarted on what it left: nothing twice, nothing without an owner.

The real Controller, reconciler, state file and secrets; a World stands for Ray and keeps what was reserved and started,
and each worker in it is a gRPC server with a worker's own fence. A `Bomb` ends the controller's process before or after
the n-th call that leaves it: a save, a number written down, a snapshot, a reservation, a start, a release, credentials.
The next controller starts on the same files, or on what a full disk, a lost file or a clock set back left of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import socket
import sqlite3
import tempfile
import time
import types
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, TypeVar

import grpc
import grpc.aio

from megatoken.access.credentials import METADATA_KEY, Credentials, identify
from megatoken.access.files import CredentialsFile
from megatoken.access.table import Identity
from megatoken.cluster.controller.loop import Controller, Settings
from megatoken.cluster.controller.main import bind_patiently
from megatoken.cluster.controller.server import ControlServer, MembershipServicer
from megatoken.cluster.controller.state import StateStore
from megatoken.cluster.decide.backend import BackendState, ProcessLaunch, ProcessObservation
from megatoken.cluster.decide.device_check import DeviceCheck
from megatoken.cluster.decide.fleet import Fleet, Phase, Replica, ReplicaObservation, Reservation, WorkerFacts
from megatoken.cluster.decide.replica import ReplicaState
from megatoken.cluster.inventory.topology import Device, Inventory, Node
from megatoken.cluster.secrets_keeper import SecretsKeeper
from megatoken.cluster.spec.cluster import ClusterSpec
from megatoken.v1 import membership_pb2, tokens_pb2, worker_pb2, worker_pb2_grpc
from megatoken.worker.fence import Fence
from tests.chaos.outcome import Outcome

NAME = "controller"
ABOUT = "the controller killed between its steps, and restarted on lost, damaged, full or outdated files"

DEVICES: Final = 6
AT_ONCE: Final = 16
STEP_S: Final = 20.0  # for one thing that was asked for to be so
DISK_FULL_S: Final = 0.7
LATER_S: Final = 1e6  # by which a clock was ahead of what it is now
INCOMPLETE: Final = 0.1  # of all looks get no answer of Ray's
LEASE_S: Final = 12.0  # longer than a starved machine keeps a renewal waiting
MODEL: Final = "m"
SPEC: Final = ClusterSpec.model_validate(
    {
        "models": [{"name": MODEL, "engine": "simulated", "replicas": 2, "drain_timeout_s": 2}],
        "agents": {"enabled": False},
        "routers": {"count": 1},
        "edge": {"count": 0},
        "control": {"tick_s": 0.05, "worker_lease_s": LEASE_S, "restart_backoff_s": 0.05},
    }
)
PORTS: Final = {"routers.port": 1, "edge.port": 1, "agents.port": 1, "control.port": 1, "control.metrics_port": 1}
Result = TypeVar("Result")


class Killed(BaseException):
    """The controller's process ends here."""


class Dead(Exception):
    """The controller that was asked is no more."""


@dataclass
class Bomb:
    """Ends a process at its `at`-th call (0: never), before what the call does or after it."""

    at: int = 0
    before: bool = True
    calls: int = 0
    dead: bool = False
    where: str = ""

    def around(self, name: str, call: Callable[[], Result]) -> Result:
        if self.dead:
            raise Killed(name)
        self.calls += 1
        now = self.calls == self.at
        if now:
            self.where = f"{'before' if self.before else 'after'} {name}, call {self.at}"
        if now and self.before:
            self.dead = True
            raise Killed(name)
        result = call()
        if now:
            self.dead = True
            raise Killed(name)
        return result


class Worker(worker_pb2_grpc.WorkerServicer):
    """One worker: it serves while its lease runs, and lets in whom its credentials let in."""

    def __init__(self, replica: str, incarnation: int, credentials: str) -> None:
        self.replica, self.incarnation = replica, incarnation
        self.take(credentials)
        self.fenced = 0
        self.life = 0
        self.renewed_by: set[int] = set()
        """Numbers of the controllers' lives in which it was renewed."""
        self.fence_ = Fence(self, asyncio.get_running_loop())
        self.server = grpc.aio.server()
        worker_pb2_grpc.add_WorkerServicer_to_server(self, self.server)  # type: ignore[no-untyped-call]
        self.address = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        self.ended = False

    def take(self, credentials: str) -> None:
        self.credentials = Credentials.model_validate_json(credentials)

    def fence(self, reason: str) -> None:
        if not self.ended:
            self.fenced += 1

    def unfence(self) -> None: ...

    async def Renew(self, request: worker_pb2.RenewRequest, context: Any) -> worker_pb2.RenewResponse:
        await self._admit(context)
        if (request.replica, request.incarnation) != (self.replica, self.incarnation):
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "this is another replica")
        stamp_s = self.fence_.renew(request.stamp_s, request.lease_s)
        if request.stamp_s:
            self.renewed_by.add(self.life)
        return worker_pb2.RenewResponse(stamp_s=stamp_s, load=tokens_pb2.Load())

    async def Drain(self, _request: worker_pb2.DrainRequest, context: Any) -> worker_pb2.DrainResponse:
        await self._admit(context)
        return worker_pb2.DrainResponse()

    async def Probe(self, _request: worker_pb2.ProbeRequest, context: Any) -> worker_pb2.ProbeResponse:
        await self._admit(context)
        return worker_pb2.ProbeResponse()

    async def _admit(self, context: Any) -> None:
        shown = dict(context.invocation_metadata()).get(METADATA_KEY, "")
        if identify(self.credentials, shown) is not Identity.CONTROLLER:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "who is this?")


@dataclass
class Held:
    """What one replica holds."""

    replica: Replica
    worker: Worker | None = None
    crashed: bool = False


class World:
    """Ray and what runs in it. It outlives every controller, and writes down what no controller may do."""

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.loop = rng, asyncio.get_running_loop()
        self.held: dict[str, Held] = {}
        self.processes: dict[str, ProcessLaunch] = {}
        self.reserved: set[str] = set()
        self.started: set[str] = set()
        self.wrong: list[str] = []
        self.lives = 0
        self.told: dict[tuple[int, int], bytes] = {}
        self.newest = (0, 0)
        self.inventory = Inventory(
            (Node("n0", "127.0.0.1", tuple(Device("cpu", index) for index in range(DEVICES)), head=True),)
        )

    def serving(self) -> list[str]:
        return sorted(name for name, held in self.held.items() if held.worker is not None and not held.crashed)

    def reserve(self, replica: Replica) -> None:
        if replica.id in self.reserved:
            self.wrong.append(f"{replica.id} was reserved twice")
            return
        taken = {(rank.node, rank.device) for held in self.held.values() for rank in held.replica.placement.ranks}
        if taken & {(rank.node, rank.device) for rank in replica.placement.ranks}:
            self.wrong.append(f"{replica.id} was given devices that another holds")
        self.reserved.add(replica.id)
        self.held[replica.id] = Held(replica)

    def start(self, replica: Replica, launch: ProcessLaunch) -> None:
        held = self.held.get(replica.id)
        if replica.id in self.started or held is None:
            self.wrong.append(f"{replica.id} was started " + ("twice" if held is not None else "without devices"))
            return
        self.started.add(replica.id)
        held.worker = self._in_loop(self._open(replica.id, launch.credentials))

    async def _open(self, replica_id: str, credentials: str) -> Worker:
        worker = Worker(replica_id, len(self.started), credentials)
        worker.life = self.lives
        await worker.server.start()
        return worker

    def release(self, replica_id: str) -> None:
        held = self.held.pop(replica_id, None)
        if held is not None and held.worker is not None:
            self._in_loop(self._close(held.worker))

    async def _close(self, worker: Worker) -> None:
        worker.ended = True
        worker.fence_.stop()
        await worker.server.stop(None)

    async def crash(self) -> None:
        """The oldest worker ends by itself."""
        name = self.serving()[0]
        held = self.held[name]
        held.crashed = True
        if held.worker is not None:
            await self._close(held.worker)

    async def close(self) -> None:
        for held in self.held.values():
            if held.worker is not None and not held.crashed:
                await self._close(held.worker)

    def watch(self, snapshot: membership_pb2.Snapshot) -> None:
        """What a router that watches would be told now."""
        number = (snapshot.epoch, snapshot.version)
        if not snapshot.version:
            return
        content = snapshot.SerializeToString(deterministic=True)
        if number < self.newest:
            self.wrong.append(f"snapshot {number} was told after {self.newest}")
        if self.told.setdefault(number, content) != content:
            self.wrong.append(f"two snapshots were told as {number}")
        self.newest = max(self.newest, number)

    def state(self) -> BackendState:
        if self.rng.random() < INCOMPLETE:
            return BackendState(self.inventory, {}, {}, complete=False)
        processes = {
            name: ProcessObservation(Phase.SERVING, {"address": "127.0.0.1:1"}, "", "n0") for name in self.processes
        }
        return BackendState(self.inventory, {name: self._seen(held) for name, held in self.held.items()}, processes)

    def _seen(self, held: Held) -> ReplicaObservation:
        if held.worker is None:
            return ReplicaObservation(Reservation.GRANTED)
        facts = WorkerFacts(held.worker.address, held.worker.incarnation, "simulated")
        phase = Phase.EXITED if held.crashed else Phase.SERVING
        return ReplicaObservation(Reservation.GRANTED, phase, facts, "killed by SIGKILL" if held.crashed else "")

    def _in_loop(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(STEP_S)


class KillableBackend:
    """The Backend of one controller."""

    ray_address, head_node = "127.0.0.1:1", "n0"

    def __init__(self, world: World, bomb: Bomb) -> None:
        self._world, self._bomb = world, bomb

    def directory_of(self, node: str) -> Path:
        return Path("/nowhere") / node

    def wait_change(self, wait_s: float) -> bool:
        time.sleep(min(wait_s, 0.02))
        return True

    def state(self) -> BackendState:
        return self._world.state()

    def reserve(self, replica: Replica) -> None:
        self._bomb.around("reserve", lambda: self._world.reserve(replica))

    def start_replica(self, replica: Replica, launch: ProcessLaunch) -> None:
        self._bomb.around("start_replica", lambda: self._world.start(replica, launch))

    def release(self, replica_id: str, _grace_s: float) -> None:
        self._bomb.around("release", lambda: self._world.release(replica_id))

    def start_process(self, launch: ProcessLaunch) -> None:
        def start() -> None:
            if launch.name in self._world.processes:
                self._world.wrong.append(f"{launch.name} was started twice")
            self._world.processes[launch.name] = launch

        self._bomb.around("start_process", start)

    def stop_process(self, name: str, _grace_s: float) -> None:
        self._bomb.around("stop_process", lambda: self._world.processes.pop(name, None))

    def tail(self, name: str, lines: int, timeout_s: float) -> str:
        return ""

    def give_credentials(self, texts: Mapping[str, str], _timeout_s: float) -> list[str]:
        def give() -> list[str]:
            for name, text in texts.items():
                held = self._world.held.get(name)
                if held is not None and held.worker is not None:
                    held.worker.take(text)
            return list(texts)

        return self._bomb.around("give_credentials", give)

    def check_device(self, check: DeviceCheck) -> None: ...

    def placement_group_id(self, replica_id: str) -> str:
        return ""

    def clean(self) -> None: ...


class KillableStore(StateStore):
    """The state file of one controller; `full`: its disk takes nothing."""

    def __init__(self, path: Path, bomb: Bomb) -> None:
        self._bomb, self.full = bomb, False
        super().__init__(path)

    def save_fleet(self, fleet: Fleet) -> None:
        self._may_write()
        self._bomb.around("save_fleet", lambda: super(KillableStore, self).save_fleet(fleet))

    def put(self, **values: str) -> None:
        self._may_write()
        self._bomb.around("put", lambda: super(KillableStore, self).put(**values))

    def put_spec(self, spec: ClusterSpec, previous: Mapping[str, Any]) -> int:
        self._may_write()
        return self._bomb.around("put_spec", lambda: super(KillableStore, self).put_spec(spec, previous))

    def _may_write(self) -> None:
        if self.full:
            raise sqlite3.OperationalError("database or disk is full")


class Life:
    """One controller's process."""

    def __init__(self, world: World, directory: Path, bomb: Bomb) -> None:
        self.world, self.bomb = world, bomb
        world.lives += 1
        for held in world.held.values():
            if held.worker is not None:
                held.worker.life = world.lives
        path = directory / "state.sqlite"
        self.store = KillableStore(path, Bomb())
        if self.store.spec() is None:  # the first one, or its file is lost: as ControllerActor does it
            self.store.put_spec(SPEC, {})
        self.store.put_ports(PORTS)
        self.store._bomb = bomb
        settings = Settings("c", path, True, "127.0.0.1", "127.0.0.1")
        self.controller = Controller(
            settings, self.store, SecretsKeeper(directory), lambda: KillableBackend(world, bomb)
        )
        self.controller.address = "127.0.0.1:1"
        notify = self.controller._publish_snapshot
        self.controller._publish_snapshot = lambda: bomb.around("publish", notify)  # type: ignore[method-assign]
        self.task = asyncio.create_task(self.controller.run())
        self.watching = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        """As a router that connects anew each time."""
        servicer = MembershipServicer(self.controller)
        while not self.bomb.dead:
            watching = servicer.Watch(membership_pb2.WatchRequest(), None)  # type: ignore[arg-type]
            with contextlib.suppress(TimeoutError, StopAsyncIteration):
                self.world.watch(await asyncio.wait_for(anext(watching), 1.0))
            await watching.aclose()  # type: ignore[attr-defined]
            await asyncio.sleep(0.005)

    async def until(self, met: Callable[[], bool]) -> None:
        """Raises Dead when the process ends first, TimeoutError when it takes too long."""
        async with asyncio.timeout(STEP_S):
            while not met():
                if self.task.done():
                    raise Dead
                await asyncio.sleep(0.01)

    async def end(self) -> None:
        """As SIGKILL would: nothing that it still does takes effect."""
        self.bomb.dead = True
        self.task.cancel()
        self.watching.cancel()
        await asyncio.gather(self.task, self.watching, return_exceptions=True)
        self.store.close()

    def settled(self, wanted: int) -> bool:
        """Exactly the wanted replicas run, each with an owner, and nothing else is held."""
        fleet, world = self.controller.fleet, self.world
        ready = sorted(replica.id for replica in fleet.replicas if replica.state is ReplicaState.READY)
        live = [replica for replica in fleet.replicas if replica.live]
        told = sorted(member.replica for member in self.controller.publisher.versions.current.replicas)
        return len(ready) == len(live) == wanted and ready == world.serving() == sorted(world.held) == told


@dataclass
class Run:
    """One script that an operator goes through, with whatever is done to the controller on the way."""

    seed: int
    name: str
    at: int = 0
    before: bool = True
    outcome: Outcome = field(default_factory=Outcome)
    calls: int = 0
    where: str = ""

    async def go(self, harm: Callable[[Run, Path], Awaitable[None]] | None = None) -> None:
        """Counts into `outcome` what should not have come of it."""
        with tempfile.TemporaryDirectory(prefix="mt-controller-") as folder:
            self.directory = Path(folder)
            self.world = World(random.Random(self.seed))
            self.life = self._born(Bomb(self.at, self.before))
            try:
                await self._script(harm)
                await self._check_owners()
            except TimeoutError:
                fleet = [f"{replica.id} {replica.state}" for replica in self.life.controller.fleet.replicas]
                self._wrong(f"not settled: fleet {fleet}, held {sorted(self.world.held)}")
            except Exception as error:
                self._wrong(f"{type(error).__name__}: {error}")
            finally:
                self.calls, self.where = self.life.bomb.calls, self.where or self.life.bomb.where
                await self.life.end()
                await self.world.close()
            for problem in self.world.wrong:
                self._wrong(problem)

    def _wrong(self, problem: str) -> None:
        self.outcome.wrong += 1
        self.outcome.problem(f"{self.name} {self.where}: {problem} (MEGATOKEN_SEED={self.seed})")

    def _born(self, bomb: Bomb) -> Life:
        return Life(self.world, self.directory, bomb)

    async def restart(self, harm: Callable[[], None] | None = None) -> None:
        """A new controller takes the place of the present one, on what `harm` leaves of its files."""
        self.where = self.where or self.life.bomb.where
        await self.life.end()
        if harm is not None:
            harm()
        self.life = self._born(Bomb())

    async def step(self, ask: Callable[[Life], None] | None, wanted: int) -> None:
        """Asks, and asks the next controller again if one dies over it; until it is so."""
        while True:
            try:
                if ask is not None:
                    ask(self.life)
                await self.life.until(lambda: self.life.settled(wanted))
                return
            except (Dead, Killed):
                await self.restart()

    async def _script(self, harm: Callable[[Run, Path], Awaitable[None]] | None) -> None:
        await self.step(None, 2)
        await self.world.crash()
        await self.step(None, 2)
        await self.step(lambda life: ignore(life.controller.desired_state.scale(MODEL, 3)), 3)
        if harm is not None:
            await harm(self, self.directory)
        await self.step(lambda life: ignore(life.controller.desired_state.scale(MODEL, 2)), 2)
        await self.step(rotate, 2)

    async def _check_owners(self) -> None:
        """Every process has an owner, and every worker's lease is renewed by the controller that there is now."""
        world = self.world
        began_s = time.monotonic()

        def owned(life: Life) -> bool:
            workers = [held.worker for held in world.held.values() if held.worker is not None]
            renewed = all(world.lives in worker.renewed_by for worker in workers)
            untold = life.controller.secrets.untold([*world.held, *world.processes])
            return renewed and set(world.processes) == set(life.controller.processes.records) and not untold

        try:
            while not owned(self.life):
                life = self.life
                try:
                    await life.until(lambda life=life: owned(life))  # type: ignore[misc]
                except Dead:
                    await self.restart()
        except TimeoutError:
            self._wrong(f"processes {sorted(world.processes)} or leases without an owner")
        self.outcome.recovered_s_max = max(self.outcome.recovered_s_max or 0.0, time.monotonic() - began_s)
        fenced = [name for name, held in world.held.items() if held.worker is not None and held.worker.fenced]
        if fenced:
            self.outcome.replicas_lost = (self.outcome.replicas_lost or 0) + len(fenced)
            self._wrong(f"{fenced} fenced themselves: nobody renewed their leases in time")


def ignore(_value: object) -> None: ...


def rotate(life: Life) -> None:
    if not life.controller.secrets.current.rotating:
        life.controller.secrets.rotate()


# -- what is done to the files between two controllers --


async def disk_full(run: Run, _directory: Path) -> None:
    """While it is full a worker dies and orders are refused; nothing is done that is not written down."""
    run.life.store.full = True
    await run.world.crash()
    with contextlib.suppress(sqlite3.OperationalError):
        run.life.controller.desired_state.scale(MODEL, 2)
    await asyncio.sleep(DISK_FULL_S)
    run.life.store.full = False
    await run.step(None, 3)


def between(harm: Callable[[Path], None]) -> Callable[[Run, Path], Awaitable[None]]:
    """Harm done to the directory while no controller runs."""

    async def done(run: Run, directory: Path) -> None:
        await run.restart(lambda: harm(directory))

    return done


def no_state(directory: Path) -> None:
    for path in directory.glob("state.sqlite*"):
        path.unlink()


def emptied_state(directory: Path) -> None:
    no_state(directory)
    (directory / "state.sqlite").touch(0o600)


def half_a_state(directory: Path) -> None:
    path = directory / "state.sqlite"
    for extra in directory.glob("state.sqlite-*"):
        extra.unlink()
    os.truncate(path, path.stat().st_size // 2 + 100)


def garbled_state(directory: Path) -> None:
    no_state(directory)
    (directory / "state.sqlite").write_bytes(bytes(range(256)) * 64)


def no_secrets(directory: Path) -> None:
    for path in (*directory.glob("*.secrets"), *directory.glob("*.credentials")):
        path.unlink()


def half_the_secrets(directory: Path) -> None:
    for path in (*directory.glob("*.secrets"), *directory.glob("*.credentials")):
        os.truncate(path, path.stat().st_size // 2)


def clock_set_back(directory: Path) -> None:
    """What is written down is of a later time than it is now, on both clocks, as after a start of the machine."""
    store = StateStore(directory / "state.sqlite")
    fleet = store.fleet()
    late = tuple(
        replace(
            replica,
            created_s=replica.created_s + LATER_S,
            since_s=replica.since_s + LATER_S,
            serves_until_s=replica.since_s + LATER_S + 1.0 if replica.state is ReplicaState.FAILED else 0.0,
        )
        for replica in fleet.replicas
    )
    store.save_fleet(replace(fleet, replicas=late))
    store.put(epoch=str(int(store.get("epoch") or 0) + int(LATER_S * 1e6)))
    store.close()


HARMS: Final = {
    "disk full": disk_full,
    **{
        harm.__name__.replace("_", " "): between(harm)
        for harm in (
            *(no_state, emptied_state, half_a_state, garbled_state),
            *(no_secrets, half_the_secrets, clock_set_back),
        )
    },
}


@contextlib.asynccontextmanager
async def held_port(seconds: float) -> AsyncIterator[int]:
    """A port that something else listens on for a while."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    let_go = asyncio.get_running_loop().call_later(seconds, listener.close)
    try:
        yield int(listener.getsockname()[1])
    finally:
        let_go.cancel()
        listener.close()


async def port_held(outcome: Outcome) -> None:
    """A restarted controller waits for its own port, and serves there."""
    with tempfile.TemporaryDirectory(prefix="mt-controller-") as folder:
        keeper = SecretsKeeper(Path(folder))
        about = types.SimpleNamespace(credentials=CredentialsFile(keeper.own_path))
        server = ControlServer(about, None)  # type: ignore[arg-type]
        began_s = time.monotonic()
        async with held_port(1.0) as port:
            bound = await bind_patiently("control.port", port, "127.0.0.1", lambda: server.start("127.0.0.1", port))
        outcome.inputs += 1
        outcome.recovered_s_max = max(outcome.recovered_s_max or 0.0, time.monotonic() - began_s)
        if bound != port:
            outcome.wrong += 1
            outcome.problem(f"it serves at {bound}, not at its own port {port}")
        await server.stop()


async def run(scale: float) -> Outcome:
    """`scale`: the share of the calls at which the controller is killed; each harm to files is done at any scale."""
    log = logging.getLogger("megatoken.cluster")
    before = log.level
    log.setLevel(logging.CRITICAL + 1)  # it tells of each harm, with its stack
    try:
        return await _run(scale)
    finally:
        log.setLevel(before)


async def _run(scale: float) -> Outcome:
    seed = int(os.environ.get("MEGATOKEN_SEED") or random.randrange(2**31))
    rng = random.Random(seed)
    outcome = Outcome(simulated=True, replicas_lost=0)
    plain = Run(seed, "undisturbed")
    await plain.go()
    places = [(at, before) for at in range(1, plain.calls + 1) for before in (True, False)]
    chosen = rng.sample(places, max(1, round(len(places) * scale)))
    runs = [Run(seed, "killed", at, before) for at, before in sorted(chosen)]
    harmed = [Run(seed, name) for name in HARMS]
    slots = asyncio.Semaphore(AT_ONCE)

    async def go(run: Run, harm: Any = None) -> None:
        async with slots:
            await run.go(harm)

    await asyncio.gather(*(go(run, HARMS[run.name]) for run in harmed), *(go(run) for run in runs))
    await port_held(outcome)
    for done in (plain, *harmed, *runs):
        outcome.inputs += 1
        outcome.wrong += done.outcome.wrong
        outcome.replicas_lost = (outcome.replicas_lost or 0) + (done.outcome.replicas_lost or 0)
        outcome.recovered_s_max = max(outcome.recovered_s_max or 0.0, done.outcome.recovered_s_max or 0.0)
        for problem in done.outcome.problems:
            outcome.problem(problem)
    return outcome
