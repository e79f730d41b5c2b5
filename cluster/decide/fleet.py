"""What the controller knows and wants, as values: replicas, their models' health, and one look at the cluster.

Pure values without behaviour beyond look-ups. reconciler.py turns (desired, fleet, observation) into the next fleet and
a plan; cluster/controller/state.py keeps the fleet in SQLite; backends make observations. Times are seconds of the head
node's monotonic clock, which outlives a controller process; `on_this_clock` is for when the machine itself was started
anew.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from megatoken.cluster.decide.cordon import Cordon, HostDevice
from megatoken.cluster.decide.exit_cause import ExitCause
from megatoken.cluster.decide.liveness import HangSeen
from megatoken.cluster.decide.replica import LIVE, ReplicaEvent, ReplicaState
from megatoken.cluster.inventory.topology import Inventory
from megatoken.cluster.placement.place import BlockedKind, Placement
from megatoken.cluster.spec.model import ModelSpec


@dataclass(frozen=True, slots=True)
class WorkerFacts:
    """What a worker said when it began to serve (its ready line)."""

    address: str
    incarnation: int
    engine: str
    metrics_address: str = ""
    max_model_len: int = 0
    vocab_size: int = 0
    max_running: int = 0
    block_size: int = 0
    kv_cache_tokens: int = 0
    weights: tuple[tuple[str, str], ...] = ()
    """SHA-256 of the files of its source, by name; empty: not known."""
    start_s: tuple[tuple[str, float], ...] = ()
    """The phases of its start in order, with the seconds that each took; the first is the reservation of its place."""


@dataclass(frozen=True, slots=True)
class Replica:
    """One replica, live or ended."""

    id: str
    model: str
    revision: str
    generation: int
    """Of the desired state that asked for it."""
    placement: Placement
    created_s: float
    state: ReplicaState = ReplicaState.RESERVING
    since_s: float = 0.0
    """When it entered its state."""
    reason: str = ""
    facts: WorkerFacts | None = None
    drain_deadline_s: float | None = None
    drain_cause: str = ""
    exit_cause: ExitCause = ExitCause.UNKNOWN
    """Why it ended; `reason` says it to people."""
    history: tuple[ReplicaEvent, ...] = ()
    """What happened to it, oldest first; bounded, since no state comes twice."""
    serves_until_s: float = 0.0
    """Of one that failed out of our reach: its lease may let it serve until then, and its replacement waits."""

    @property
    def serial(self) -> int:
        """The number in its id; later replicas have higher ones."""
        return serial_of(self.id)

    @property
    def live(self) -> bool:
        return self.state in LIVE

    @property
    def active(self) -> bool:
        """Counts towards the wanted number: live and not on its way out."""
        return self.live and self.state is not ReplicaState.DRAINING


def serial_of(replica_id: str) -> int:
    """The number in a replica's id."""
    return int(replica_id.rpartition("-")[2])


def start_text(replica: Replica) -> str:
    """How long its start took and with what, as one phrase; empty: not known."""
    phases = replica.facts.start_s if replica.facts is not None else ()
    if not phases:
        return ""
    took = ", ".join(f"{name} {seconds:.1f}" for name, seconds in phases)
    return f"after {sum(seconds for _, seconds in phases):.1f} s ({took})"


@dataclass(frozen=True, slots=True)
class ModelHealth:
    """How starting a model went lately."""

    failures: int = 0
    """Failed starts, or early deaths, in a row."""
    not_before_s: float = 0.0
    """No new start before this."""
    revision: str = ""
    """The revision that `failures` counts."""
    last_failure: str = ""
    served: bool = False
    """Whether the last one had begun to serve before it died."""


@dataclass(frozen=True, slots=True)
class Block:
    """Why fewer replicas of a model run than are wanted, and what would unblock it."""

    kind: BlockedKind
    text: str
    """Says the same until something changed."""
    passes: bool = False
    """Whether it ends by itself before long: requests wait for a replica instead of being refused with the text."""


@dataclass(frozen=True, slots=True)
class Fleet:
    """Everything the reconciler remembers between ticks."""

    replicas: tuple[Replica, ...] = ()
    health: Mapping[str, ModelHealth] = field(default_factory=dict)
    blocked: Mapping[str, Block] = field(default_factory=dict)
    """By model."""
    rollouts: Mapping[str, str] = field(default_factory=dict)
    """By model: progress of an update, for people."""
    serial: int = 0
    """The number of the last replica made; ids are never used twice."""

    def retry_s(self, model: str) -> float | None:
        """When a start that waits after failures is tried; None where none waits."""
        block = self.blocked.get(model)
        if block is None or block.kind is not BlockedKind.STARTS or model not in self.health:
            return None
        return self.health[model].not_before_s

    def replica(self, replica_id: str) -> Replica | None:
        return next((replica for replica in self.replicas if replica.id == replica_id), None)

    def of_model(self, model: str) -> tuple[Replica, ...]:
        return tuple(replica for replica in self.replicas if replica.model == model)


def on_this_clock(fleet: Fleet, now: float) -> Fleet:
    """A fleet that was written down, on the clock that runs now.

    Times to come mean that the clock began anew with its machine: the newest of them becomes `now`, and what was to
    happen so long after it still is. Else deadlines and leases of before would hold for as long as the machine ran.
    """
    ahead_s = max((replica.since_s for replica in fleet.replicas), default=now) - now
    if ahead_s <= 0:
        return fleet
    moved = tuple(
        replace(
            replica,
            created_s=replica.created_s - ahead_s,
            since_s=replica.since_s - ahead_s,
            drain_deadline_s=None if replica.drain_deadline_s is None else replica.drain_deadline_s - ahead_s,
            serves_until_s=replica.serves_until_s - ahead_s if replica.serves_until_s else 0.0,
        )
        for replica in fleet.replicas
    )
    return replace(fleet, replicas=moved)


@dataclass(frozen=True, slots=True)
class Desired:
    """What was asked for."""

    generation: int = 0
    models: tuple[ModelSpec, ...] = ()
    previous: Mapping[str, ModelSpec] = field(default_factory=dict)
    """By model: what it was before its running update; a rollback returns to it."""
    drained_nodes: frozenset[str] = frozenset()
    """As operators' orders are kept: by `Node.host`. `on_nodes` puts Ray's ids of now in their place."""
    cordons: Mapping[HostDevice, Cordon] = field(default_factory=dict)
    drain_requests: Mapping[str, float] = field(default_factory=dict)
    """Replica ids that an operator takes out of service, with the seconds their requests get."""
    device_needs: Mapping[str, int] = field(default_factory=dict)
    """By model: bytes that the fullest rank needs on its device, where that could be estimated."""
    stopping: bool = False
    """The cluster goes down: everything drains and nothing starts."""

    def on_nodes(self, inventory: Inventory) -> Desired:
        """With the ids that the nodes have now."""
        drained = frozenset(node.id for node in inventory.nodes if node.host in self.drained_nodes)
        cordons = {
            (node.id, device): cordon
            for node in inventory.nodes
            for (host, device), cordon in self.cordons.items()
            if host == node.host
        }
        return replace(self, drained_nodes=drained, cordons=cordons)


class Reservation(StrEnum):
    NONE = "none"
    PENDING = "pending"
    GRANTED = "granted"


class Phase(StrEnum):
    """What a backend sees of a process."""

    NONE = "none"
    STARTING = "starting"
    SERVING = "serving"
    EXITED = "exited"


@dataclass(frozen=True, slots=True)
class ReplicaObservation:
    """What a backend sees of one replica."""

    reservation: Reservation = Reservation.NONE
    phase: Phase = Phase.NONE
    facts: WorkerFacts | None = None
    reason: str = ""
    """Why it exited, for people."""
    cause: ExitCause = ExitCause.UNKNOWN
    """Why it exited."""
    unfinished: int | None = None
    """Requests it still has, as stated after it refused new ones; None: not stated."""
    hang: HangSeen | None = None
    """How it hangs, though its process is there."""
    start_phase: str = ""
    """What it does until it serves."""
    lease_until_s: float = 0.0
    """When it has stopped serving if nothing of it can be reached; 0: it has no lease."""

    @property
    def holds_something(self) -> bool:
        return self.reservation is not Reservation.NONE or self.phase is not Phase.NONE


@dataclass(frozen=True, slots=True)
class Observation:
    """One look at the cluster."""

    inventory: Inventory = field(default_factory=Inventory)
    replicas: Mapping[str, ReplicaObservation] = field(default_factory=dict)
    complete: bool = True
    """False when Ray could not be asked: then nothing is concluded from absence."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The controller's habits, from the spec's `control` section."""

    reserve_timeout_s: float = 30.0
    backoff_s: float = 1.0
    backoff_max_s: float = 60.0
    drain_grace_s: float = 0.5
    """Between telling routers and telling the worker, so that no request meets a closed door."""
    drain_overtime_s: float = 2.0
    """Past the drain deadline, at which routers resume what is left elsewhere."""
    settled_s: float = 30.0
    """A replica that was READY this long starts its model's failure count anew."""
    ended_kept: int = 32
    """Ended replicas kept for `status`."""


@dataclass(frozen=True, slots=True)
class Reserve:
    replica: Replica


@dataclass(frozen=True, slots=True)
class Start:
    replica: Replica


@dataclass(frozen=True, slots=True)
class TellDrain:
    """Asks the worker to refuse new requests and to state what is left. Idempotent."""

    replica: Replica


@dataclass(frozen=True, slots=True)
class Release:
    """Ends whatever a replica holds: worker, devices. Idempotent."""

    replica_id: str


@dataclass(frozen=True, slots=True)
class RollBack:
    """Puts the model's previous spec back in the desired state."""

    model: str
    reason: str


Action = Reserve | Start | TellDrain | Release | RollBack


def ranks_by_node(replicas: Iterable[Replica]) -> Counter[str]:
    """How many ranks of live replicas each node has."""
    return Counter(rank.node for replica in replicas if replica.live for rank in replica.placement.ranks)


@dataclass(frozen=True, slots=True)
class ClusterEvent:
    """One thing that changed, for `megatoken events`."""

    kind: str
    subject: str
    message: str
    cause: str = ""
    fields: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Plan:
    """What one tick decided."""

    fleet: Fleet
    actions: tuple[Action, ...] = ()
    events: tuple[ClusterEvent, ...] = ()
