"""A Ray that exists only as values, with a virtual clock and seeded faults, for the shipped reconciler to control."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

from megatoken.cluster.decide.exit_cause import ExitCause
from megatoken.cluster.decide.fleet import (
    Action,
    Observation,
    Phase,
    Release,
    ReplicaObservation,
    Reservation,
    Reserve,
    Start,
    TellDrain,
    WorkerFacts,
)
from megatoken.cluster.inventory.topology import Device, Inventory, Node
from megatoken.cluster.placement.place import Placement


@dataclass
class Held:
    """What one replica holds in this world."""

    placement: Placement
    granted_at_s: float
    started_at_s: float | None = None
    serves_at_s: float = 0.0
    exits_at_s: float | None = None
    reason: str = ""
    cause: ExitCause = ExitCause.UNKNOWN
    requests: int = 0
    refuses: bool = False
    told: int | None = None
    released_at_s: float | None = None


@dataclass
class Faults:
    """Rates a tick; all zero heals the world."""

    node_dies: float = 0.0
    node_returns: float = 0.3
    process_dies: float = 0.0
    start_fails: float = 0.0
    look_fails: float = 0.0
    slow_grant: float = 0.0


@dataclass
class SimulatedRay:
    """Nodes, reservations and processes; `apply` takes actions, `observe` tells what is."""

    rng: random.Random
    slots: tuple[int, ...]
    faults: Faults = field(default_factory=Faults)
    now: float = 0.0
    held: dict[str, Held] = field(default_factory=dict)
    dead: set[str] = field(default_factory=set)
    incarnation: int = 0

    def __post_init__(self) -> None:
        self.nodes = [
            Node(f"n{number}", f"10.0.0.{number}", tuple(Device("cpu", index) for index in range(count)))
            for number, count in enumerate(self.slots)
        ]

    @property
    def inventory(self) -> Inventory:
        return Inventory(tuple(replace(node, alive=node.id not in self.dead) for node in self.nodes))

    def step(self, seconds: float) -> None:
        """Lets time pass and faults happen."""
        self.now += seconds
        for node in self.nodes:
            if node.id in self.dead:
                if self.rng.random() < self.faults.node_returns:
                    self.dead.discard(node.id)
            elif self.rng.random() < self.faults.node_dies:
                self._kill_node(node.id)
        for held in self.held.values():
            if held.started_at_s is not None and self.rng.random() < self.faults.process_dies:
                held.exits_at_s, held.reason = self.now, "killed by SIGKILL"
                held.cause = ExitCause.KILLED_FROM_OUTSIDE
            if held.refuses and held.requests and self.rng.random() < 0.5:
                held.requests -= 1
            if not held.refuses and held.requests < 3 and self.rng.random() < 0.3:
                held.requests += 1
        gone = [
            name
            for name, held in self.held.items()
            if held.released_at_s is not None and held.released_at_s <= self.now
        ]
        for name in gone:
            del self.held[name]

    def _kill_node(self, node: str) -> None:
        self.dead.add(node)
        for held in self.held.values():
            if node in held.placement.nodes:
                held.exits_at_s, held.reason, held.cause = self.now, "its node died", ExitCause.NODE_LOST

    def apply(self, actions: tuple[Action, ...]) -> None:
        for action in actions:
            match action:
                case Reserve(replica) if replica.id not in self.held:
                    delay_s = 40.0 if self.rng.random() < self.faults.slow_grant else self.rng.random()
                    self.held[replica.id] = Held(replica.placement, self.now + delay_s)
                case Start(replica) if replica.id in self.held and self.held[replica.id].started_at_s is None:
                    held = self.held[replica.id]
                    held.started_at_s, held.serves_at_s = self.now, self.now + self.rng.uniform(0.5, 5.0)
                    if self.rng.random() < self.faults.start_fails:
                        held.exits_at_s, held.reason = self.now + 1.0, "exit status 1: no memory"
                        held.cause = ExitCause.PROGRAM_ENDED
                case TellDrain(replica) if replica.id in self.held:
                    held = self.held[replica.id]
                    held.refuses, held.told = True, held.requests
                case Release(replica_id) if replica_id in self.held:
                    held = self.held[replica_id]
                    if held.released_at_s is None:
                        held.released_at_s = self.now + self.rng.uniform(0.0, 2.0)

    def observe(self) -> Observation:
        if self.rng.random() < self.faults.look_fails:
            return Observation(self.inventory, {}, complete=False)
        return Observation(self.inventory, {name: self._seen(name, held) for name, held in self.held.items()})

    def _seen(self, name: str, held: Held) -> ReplicaObservation:
        granted = held.granted_at_s <= self.now
        reservation = Reservation.GRANTED if granted else Reservation.PENDING
        phase, facts = Phase.NONE, None
        if held.started_at_s is not None:
            phase = Phase.STARTING
            if held.serves_at_s <= self.now:
                phase, facts = Phase.SERVING, WorkerFacts(f"{name}:1", 1, "simulated")
        if held.exits_at_s is not None and held.exits_at_s <= self.now:
            phase = Phase.EXITED
        return ReplicaObservation(reservation, phase, facts, held.reason, held.cause, held.told)
