"""What the doctor learns about nodes and the links between them, and what it finds. Values only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Severity(StrEnum):
    """What a finding means for a launch."""

    STOP = "stop"  # a launch would fail, or serve wrongly
    WARN = "warn"  # it would run, worse than it could
    GOOD = "good"


@dataclass(frozen=True, slots=True)
class Finding:
    """One sentence of what is, and one of what to do."""

    severity: Severity
    check: str
    subject: str
    what: str
    do: str = ""


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """One node, as a process on it saw it."""

    node: str
    """Ray's id, or "local"."""
    address: str
    hostname: str
    hostname_addresses: tuple[str, ...] = ()
    """What the host name resolves to on the node itself; empty: it does not resolve."""
    interface: str = ""
    """The interface that carries `address`; empty: none does."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """ray, vllm, torch, python, megatoken, driver; a missing one is absent."""
    accelerators: int = 0
    """GPUs that the kernel driver knows."""
    expected_gpus: int = 0
    """GPUs that Ray would schedule on the node."""
    clock_offset_s: float = 0.0
    """The node's clock minus the asker's."""
    clock_error_s: float = 0.0
    """Half the round trip: the offset is known no better."""
    shm_bytes: int = 0
    shm_free_bytes: int = 0
    cache_directory: str = ""
    cache_free_bytes: int = 0
    missing_sources: tuple[str, ...] = ()
    """Model directories of the spec that the node does not have."""
    open_files: int = 0
    locked_memory: int = -1
    """Bytes; -1: unlimited."""
    rdma: bool = False
    """An RDMA device is present."""
    busy_ports: tuple[int, ...] = ()
    """Ports of the spec that another process has; asked of the head only."""
    error: str = ""
    """Why nothing could be learnt; the rest is then empty."""


@dataclass(frozen=True, slots=True)
class LinkFacts:
    """Whether one node can open a connection to another."""

    source: str
    target: str
    connect_s: float = 0.0
    error: str = ""


@dataclass(frozen=True, slots=True)
class PairFacts:
    """An all-reduce between two nodes."""

    first: str
    second: str
    backend: str
    latency_s: float = 0.0
    """Of eight bytes, median."""
    bandwidth_bytes_per_s: float = 0.0
    error: str = ""


@dataclass(frozen=True, slots=True)
class Needs:
    """What the spec asks of every node."""

    weight_bytes: int = 0
    """Largest model that a node may have to download."""
    uses_vllm: bool = True
    several_ranks: bool = True
    """A replica of some model is more than one process: they talk over shared memory."""
    multinode: bool = False


@dataclass(frozen=True, slots=True)
class Examination:
    """All that was learnt in one run."""

    nodes: tuple[NodeFacts, ...]
    links: tuple[LinkFacts, ...] = ()
    pairs: tuple[PairFacts, ...] = ()
    note: str = ""
