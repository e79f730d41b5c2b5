"""Replicas out of reach while requests run: frozen, cut off from the controller, and drained by a stranger.

Routers and workers are the real programs, started by the shipped supervision of child processes; the real controller
runs in this process on a backend that stands for Ray, which can take a node for dead as Ray does. No network is cut:
a cut here means that no renewal arrives and that nothing on the node can be ended any more, while routers still reach
the worker, which is the worse case for serving twice. Real links are cut in tests/netns/test_multinode_loss.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc
import grpc.aio

from megatoken.access.credentials import METADATA_KEY, new_secrets
from megatoken.access.table import Identity
from megatoken.cluster.controller.loop import Controller, Settings
from megatoken.cluster.controller.ports import find_ports
from megatoken.cluster.controller.server import ControlServer
from megatoken.cluster.controller.state import StateStore
from megatoken.cluster.decide.backend import BackendState, ProcessLaunch, ProcessObservation
from megatoken.cluster.decide.device_check import DeviceCheck
from megatoken.cluster.decide.fleet import Phase, Replica, ReplicaObservation, Reservation, WorkerFacts
from megatoken.cluster.decide.liveness import PartSeen
from megatoken.cluster.inventory.topology import Device, Inventory, Node
from megatoken.cluster.ray.child import Child, Launch
from megatoken.cluster.secrets_keeper import SecretsKeeper
from megatoken.cluster.spec.cluster import ClusterSpec
from megatoken.errors import MegatokenError
from megatoken.router.client.client import TokenClient
from megatoken.v1 import tokens_pb2, tokens_pb2_grpc, worker_pb2, worker_pb2_grpc
from tests.chaos.outcome import Outcome

NAME = "partition"
ABOUT = "workers frozen, cut off and drained by strangers, while requests run through a router"

ROUNDS: Final = 6
LEASE_S: Final = 3.0
FOUND_S: Final = 0.2  # after a cut Ray takes the node for dead: before the lease is over, as by the shipped settings
SEEN_S: Final = 0.3  # at most between a worker's fence and our seeing it
NODE_ENDS_S: Final = 4.5  # after a cut the node ends itself, and all on it: after the lease is over
PATIENCE_S: Final = 30.0
TOKENS: Final = 150
STREAMS: Final = 4
MODEL: Final = "m"
PROMPTS: Final = [[number, 2, 3] for number in range(1, STREAMS + 1)]
SPEC: Final = ClusterSpec.model_validate(
    {
        "models": [
            {
                "name": MODEL,
                "engine": "simulated",
                "replicas": 2,
                "drain_timeout_s": 2,
                "simulated": {"decode_tokens_per_s": 3200, "max_running": 16},
                "placement": {"separate": "node"},
            }
        ],
        "agents": {"enabled": False},
        "routers": {"count": 1, "resume": {"hang_s": 1.5}},
        "edge": {"count": 0},
        "control": {"tick_s": 0.1, "worker_lease_s": LEASE_S, "hang_s": 3, "probe_s": 2, "restart_backoff_s": 0.1},
    }
)


@dataclass
class Running:
    """A child, and where it runs."""

    child: Child
    node: str
    replica: Replica | None = None


class Nodes:
    """Three nodes on this machine, as a Backend; one of them can be cut off."""

    ray_address, head_node = "127.0.0.1:1", "n0"

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.running: dict[str, Running] = {}
        self.reserved: dict[str, Replica] = {}
        self.dead: set[str] = set()
        self.unreachable: set[str] = set()
        self.started_s: dict[str, float] = {}

    def inventory(self) -> Inventory:
        return Inventory(
            tuple(
                Node(name, "127.0.0.1", (Device("cpu", 0),), alive=name not in self.dead, head=name == "n0")
                for name in ("n0", "n1", "n2")
            )
        )

    def wait_change(self, wait_s: float) -> bool:
        time.sleep(min(wait_s, 0.05))
        return True

    def state(self) -> BackendState:
        replicas = {name: self._seen(name, replica) for name, replica in self.reserved.items()}
        processes = {}
        for name, running in list(self.running.items()):
            if running.replica is None:
                state = running.child.state()
                processes[name] = ProcessObservation(Phase(state.phase), state.facts, state.reason, running.node)
        return BackendState(self.inventory(), replicas, processes)

    def _seen(self, name: str, replica: Replica) -> ReplicaObservation:
        running = self.running.get(name)
        if running is None:
            return ReplicaObservation(Reservation.GRANTED)
        state = running.child.state()
        facts = None
        if state.facts is not None:
            known = WorkerFacts.__dataclass_fields__
            facts = WorkerFacts(**{key: value for key, value in state.facts.items() if key in known and value})
        return ReplicaObservation(Reservation.GRANTED, Phase(state.phase), facts, state.reason, state.cause)

    def directory_of(self, node: str) -> Path:
        return self.directory / node

    def reserve(self, replica: Replica) -> None:
        self.reserved.setdefault(replica.id, replica)

    def start_replica(self, replica: Replica, launch: ProcessLaunch) -> None:
        if replica.id not in self.running:
            self.started_s[replica.id] = time.monotonic()
            self._start(launch, replica)

    def start_process(self, launch: ProcessLaunch) -> None:
        if launch.name not in self.running:
            self._start(launch, None)

    def _start(self, launch: ProcessLaunch, replica: Replica | None) -> None:
        env = {name: value for name, value in launch.env.items() if not name.startswith("MEGATOKEN_NODE")}
        started = Launch(launch.name, launch.program, launch.settings, launch.directory, env, launch.credentials)
        self.running[launch.name] = Running(Child(started), launch.node, replica)

    def release(self, replica_id: str, grace_s: float) -> None:
        replica = self.reserved.get(replica_id)
        if replica is None or set(replica.placement.nodes) & self.unreachable:
            return
        self.end(replica_id, grace_s)

    def end(self, name: str, grace_s: float) -> None:
        self.reserved.pop(name, None)
        running = self.running.pop(name, None)
        if running is not None:
            running.child.stop(grace_s)

    def stop_process(self, name: str, grace_s: float) -> None:
        self.end(name, grace_s)

    def tail(self, name: str, lines: int, _timeout_s: float) -> str:
        return self.running[name].child.tail(lines)

    def give_credentials(self, texts: Mapping[str, str], _timeout_s: float) -> list[str]:
        told = [name for name in texts if name in self.running]
        for name in told:
            self.running[name].child.give_credentials(texts[name])
        return told

    def inspect(self, _replicas: Sequence[Replica], _timeout_s: float) -> dict[str, tuple[PartSeen, ...]]:
        return {}

    def check_device(self, check: DeviceCheck) -> None: ...

    def placement_group_id(self, replica_id: str) -> str:
        return ""

    def clean(self) -> None: ...


class Cluster:
    """The controller, its server, and what it started."""

    def __init__(self, directory: Path, nodes: Nodes) -> None:
        self.nodes, path = nodes, directory / "state.sqlite"
        self.store = StateStore(path)
        self.store.put_spec(SPEC, {})
        names = ("control.port", "routers.port", "edge.port", "agents.port", "control.metrics_port")
        self.ports = dict(zip(names, find_ports(len(names), "127.0.0.1", random.Random()), strict=True))
        self.store.put_ports(self.ports)
        self.secrets = SecretsKeeper(directory)
        settings = Settings("c", path, True, "127.0.0.1", "127.0.0.1")
        self.controller = Controller(settings, self.store, self.secrets, lambda: nodes)
        self.server = ControlServer(self.controller, None)
        self.cut: set[str] = set()
        renew = self.controller.links._renew

        async def unless_cut(replica: Replica, lease_s: float, cpu_ranks: int) -> None:
            if replica.id not in self.cut:
                await renew(replica, lease_s, cpu_ranks)

        self.controller.links._renew = unless_cut  # type: ignore[method-assign]

    async def start(self) -> None:
        port = await self.server.start("127.0.0.1", self.ports["control.port"])
        self.controller.address = f"127.0.0.1:{port}"
        self.task = asyncio.create_task(self.controller.run())

    async def stop(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        await self.server.stop()
        self.store.close()
        for name in list(self.nodes.running):
            await asyncio.to_thread(self.nodes.end, name, 2.0)

    @property
    def router(self) -> str:
        return f"127.0.0.1:{self.ports['routers.port']}"

    def serving(self) -> dict[str, str]:
        """Addresses by replica, as routers are told."""
        return {member.replica: member.address for member in self.controller.publisher.versions.current.replicas}

    async def until(self, what: str, met: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        while not met():
            if time.monotonic() > deadline_s:
                states = [f"{row.id} {row.state} {row.reason}" for row in self.controller.fleet.replicas]
                raise RuntimeError(f"not within {PATIENCE_S:.0f} s: {what}; {states}")
            await asyncio.sleep(0.02)

    async def ready(self, without: str = "") -> None:
        await self.until("two replicas serve", lambda: len(self.serving()) == 2 and without not in self.serving())

    async def refuses(self, address: str) -> str:
        """Why the worker refuses a request; empty when it serves it."""
        token = ((METADATA_KEY, self.secrets.current.token(Identity.ROUTER)),)
        sampling = tokens_pb2.SamplingParams(max_tokens=1)
        request = tokens_pb2.GenerateRequest(request_id=os.urandom(4).hex(), model=MODEL, prompt=[1], sampling=sampling)
        async with grpc.aio.insecure_channel(address) as channel:
            try:
                async for _ in tokens_pb2_grpc.TokensStub(channel).Generate(request, timeout=2.0, metadata=token):  # type: ignore[no-untyped-call]
                    pass
            except grpc.aio.AioRpcError as error:
                return f"{error.code().name} {error.details()}"
        return ""


class Traffic:
    """Clients that ask the same questions again and again, and know the answers."""

    def __init__(self, cluster: Cluster, outcome: Outcome) -> None:
        self._cluster, self._outcome = cluster, outcome
        self._stopping = False
        self._expected: list[list[int]] = []

    async def learn(self) -> None:
        async with TokenClient([self._cluster.router]) as client:
            self._expected = await asyncio.gather(*(self._ask(client, prompt) for prompt in PROMPTS))

    async def _ask(self, client: TokenClient, prompt: list[int]) -> list[int]:
        return await client.generate(MODEL, prompt=prompt, max_tokens=TOKENS, ignore_eos=True, temperature=0.0).tokens()

    @contextlib.asynccontextmanager
    async def flowing(self) -> AsyncIterator[None]:
        self._stopping = False
        async with TokenClient([self._cluster.router]) as client:
            streams = [asyncio.create_task(self._stream(client, number)) for number in range(STREAMS)]
            await asyncio.sleep(0.3)
            try:
                yield
            finally:
                self._stopping = True
                _, left = await asyncio.wait(streams, timeout=PATIENCE_S)
                for stream in left:
                    stream.cancel()
                    self._outcome.lost += 1
                    self._outcome.problem("a request hung")

    async def _stream(self, client: TokenClient, number: int) -> None:
        while not self._stopping:
            self._outcome.requests += 1
            try:
                got = await self._ask(client, PROMPTS[number])
            except MegatokenError as error:
                self._outcome.lost += 1
                self._outcome.problem(f"a request ended with {type(error).__name__}: {error}")
                continue
            wanted = self._expected[number]
            if got != wanted:
                self._outcome.lost += max(0, len(wanted) - len(got))
                self._outcome.doubled += max(0, len(got) - len(wanted))
                self._outcome.wrong += len(got) == len(wanted)
                self._outcome.problem(f"an answer of {len(got)} tokens differs from the undisturbed one")


async def freeze(cluster: Cluster, rng: random.Random, outcome: Outcome) -> None:
    """A worker that is there and does nothing: it is ended and replaced."""
    victim = rng.choice(sorted(cluster.serving()))
    pid = cluster.nodes.running[victim].child.state().pid
    began_s = time.monotonic()
    os.kill(pid, signal.SIGSTOP)
    await cluster.ready(without=victim)
    outcome.recovered_s_max = max(outcome.recovered_s_max or 0.0, time.monotonic() - began_s)
    await cluster.until("the frozen process is gone", lambda: not Path(f"/proc/{pid}").exists())


async def cut(cluster: Cluster, rng: random.Random, outcome: Outcome) -> None:
    """A worker that the controller cannot reach serves nobody before its replacement starts."""
    nodes = cluster.nodes
    members = {row.id: row.placement.driver_node for row in cluster.controller.fleet.replicas if row.active}
    victim = rng.choice(sorted(name for name, node in members.items() if node != nodes.head_node) or sorted(members))
    node, address = members[victim], cluster.serving()[victim]
    known = set(nodes.started_s)
    cluster.cut.add(victim)
    nodes.unreachable.add(node)
    began_s = time.monotonic()
    fenced_s = ended_s = 0.0
    while not fenced_s or not ended_s or len(set(nodes.started_s) - known) < 1:
        now = time.monotonic()
        if now - began_s > PATIENCE_S:
            raise RuntimeError(f"cut off for {PATIENCE_S:.0f} s: fenced {fenced_s > 0}, started {set(nodes.started_s)}")
        if now - began_s >= FOUND_S:
            nodes.dead.add(node)
        if not fenced_s and (why := await cluster.refuses(address)):
            fenced_s = time.monotonic()
            if "UNAVAILABLE" not in why or "is fenced" not in why:
                outcome.wrong += 1
                outcome.problem(f"the cut-off worker refused with {why!r}")
        if not ended_s and now - began_s >= NODE_ENDS_S:
            ended_s = now
            nodes.unreachable.discard(node)
            await asyncio.to_thread(nodes.end, victim, 0.0)
        await asyncio.sleep(0.02)
    (replacement,) = set(nodes.started_s) - known
    if nodes.started_s[replacement] < fenced_s - SEEN_S:
        outcome.wrong += 1
        early_s = fenced_s - nodes.started_s[replacement]
        outcome.problem(f"the replacement started {early_s:.2f} s before the cut-off worker fenced itself")
    await cluster.ready(without=victim)
    outcome.recovered_s_max = max(outcome.recovered_s_max or 0.0, time.monotonic() - began_s)
    nodes.dead.discard(node)
    cluster.cut.discard(victim)


async def drain_by_strangers(cluster: Cluster, rng: random.Random, outcome: Outcome) -> None:
    """Nobody but the controller drains a worker."""
    name, address = rng.choice(sorted(cluster.serving().items()))
    own, other = cluster.secrets.current, new_secrets()
    strangers = {
        "nobody": (),
        "another cluster's controller": ((METADATA_KEY, other.token(Identity.CONTROLLER)),),
        "a router": ((METADATA_KEY, own.token(Identity.ROUTER)),),
        "a worker": ((METADATA_KEY, own.token(Identity.WORKER)),),
    }
    async with grpc.aio.insecure_channel(address) as channel:
        stub = worker_pb2_grpc.WorkerStub(channel)  # type: ignore[no-untyped-call]
        for who, shown in strangers.items():
            outcome.inputs += 1
            try:
                await stub.Drain(worker_pb2.DrainRequest(), timeout=2.0, metadata=shown)
            except grpc.aio.AioRpcError as error:
                if error.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
                    continue
            outcome.wrong += 1
            outcome.problem(f"{who} drained {name}")
    if why := await cluster.refuses(address):
        outcome.wrong += 1
        outcome.problem(f"{name} refuses requests after a stranger's drain: {why}")


async def run(scale: float) -> Outcome:
    """`scale`: of the rounds; one at least."""
    seed = int(os.environ.get("MEGATOKEN_SEED") or random.randrange(2**31))
    rng = random.Random(seed)
    outcome = Outcome(simulated=True)
    with tempfile.TemporaryDirectory(prefix="mt-partition-") as folder:
        nodes = Nodes(Path(folder))
        cluster = Cluster(Path(folder), nodes)
        await cluster.start()
        try:
            await cluster.ready()
            await cluster.until(
                "the router serves", lambda: len(cluster.controller.publisher.versions.current.routers) == 1
            )
            traffic = Traffic(cluster, outcome)
            await traffic.learn()
            for _ in range(max(1, round(ROUNDS * scale))):
                for harm in (drain_by_strangers, freeze, cut):
                    async with traffic.flowing():
                        await harm(cluster, rng, outcome)
                    outcome.inputs += 1
                    await cluster.ready()
        except Exception as error:
            outcome.wrong += 1
            outcome.problem(f"{type(error).__name__}: {error}")
        finally:
            await cluster.stop()
    if outcome.problems:
        outcome.problem(f"MEGATOKEN_SEED={seed}")
    return outcome
