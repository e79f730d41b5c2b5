"""The values placement speaks in: what a replica asks for, where it was put, or why it has no place."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class TpSpan(StrEnum):
    """How far one TP group may reach."""

    LINK = "link"  # one link domain of one node
    NODE = "node"  # one node, any of its link domains
    ANY = "any"  # several nodes, where no node holds it


class Separate(StrEnum):
    """What two replicas of one model may not share."""

    NONE = "none"
    NODE = "node"
    RACK = "rack"  # the failure domain: the rack, or the node where none is declared


@dataclass(frozen=True, slots=True)
class Constraints:
    """Where a replica may stand. Empty means anywhere."""

    device_kinds: tuple[str, ...] = ()
    sites: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()
    """Node ids, names or addresses."""
    labels: tuple[tuple[str, str], ...] = ()
    """Labels that a node must carry, with these values."""
    separate: Separate = Separate.NONE
    avoid: tuple[str, ...] = ()
    """Models whose replicas may not share a node with this one; it holds both ways."""
    tp_span: TpSpan = TpSpan.LINK
    cross_site: bool = False
    """Whether the PP stages or data-parallel copies of one replica may stand in different sites."""


@dataclass(frozen=True, slots=True)
class ReplicaRequest:
    """One replica that wants a place. Sizes are at least 1."""

    replica: str
    model: str
    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    device_memory_bytes: int = 0
    """What the fullest rank needs on its device (cluster/inventory/model_shape.py estimates it); 0: not checked."""
    constraints: Constraints = field(default_factory=Constraints)

    @property
    def groups(self) -> int:
        """TP groups: one per PP stage of each data-parallel copy."""
        return self.pipeline * self.data

    @property
    def width(self) -> int:
        """Ranks, which is devices."""
        return self.tensor * self.pipeline * self.data


@dataclass(frozen=True, slots=True)
class Rank:
    """One device's share of a replica, and the placement-group bundle of the same number."""

    rank: int
    node: str
    device: int
    kind: str
    data: int = 0
    stage: int = 0
    tensor: int = 0


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one replica stands: bundle i is rank i, one device each, pinned to its node."""

    replica: str
    model: str
    ranks: tuple[Rank, ...]
    avoid: tuple[str, ...] = ()

    @property
    def driver_node(self) -> str:
        """Where the worker process belongs: the node of rank 0."""
        return self.ranks[0].node

    @property
    def nodes(self) -> tuple[str, ...]:
        """Its nodes in rank order, each once."""
        return tuple(dict.fromkeys(rank.node for rank in self.ranks))

    @property
    def bundle_indices(self) -> str:
        """The value of VLLM_RAY_BUNDLE_INDICES that makes vLLM's Ray executor keep this rank order."""
        return ",".join(str(rank.rank) for rank in self.ranks)


class BlockedKind(StrEnum):
    """What keeps a model from running as many replicas as were asked for, where a program asks."""

    CAPACITY = "capacity"
    """Devices are missing."""
    MEMORY = "memory"
    """No allowed device is large enough for a rank."""
    TOPOLOGY = "topology"
    """There are devices, but not together as its groups need them."""
    CONSTRAINT = "constraint"
    """No node carries what the spec asks for."""
    SPEC = "spec"
    """The sizes do not suit the model."""
    STARTS = "starts"
    """Its replicas failed, and the next start waits."""
    LEASE = "lease"
    """A lost replica may serve on until its lease ends."""


@dataclass(frozen=True, slots=True)
class Blocked:
    """Why a replica has no place, and what would give it one. Both are whole sentences, for `status`."""

    replica: str
    model: str
    kind: BlockedKind
    reason: str
    unblock: str


Outcome = Placement | Blocked
