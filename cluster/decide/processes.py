"""Which routers, edges and agents should run, and what to start or stop for that. Pure; the controller calls it.

A process is named SLOT.REVISION, where the revision is a hash of its configuration. A changed configuration therefore
is a new process: it starts beside the old one on the same port (SO_REUSEPORT), and the old one is told to drain once
the new one serves. A process that ended is started again under its own name, after a
pause that doubles with each failure.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from megatoken.backoff import doubling_pause_s
from megatoken.cluster.decide.backend import AGENT, EDGE, ROUTER, ProcessLaunch, ProcessObservation
from megatoken.cluster.decide.fleet import Fleet, Phase
from megatoken.cluster.decide.launches import LaunchContext, agent_launch, edge_launch, router_launch
from megatoken.cluster.inventory.topology import Inventory, Node
from megatoken.cluster.spec.cluster import ClusterSpec

KINDS = {ROUTER: "router", EDGE: "edge", AGENT: "agent"}
SETTLED_S = 30.0  # a process that served this long starts its failure count anew
BACKOFF_S, BACKOFF_MAX_S = 1.0, 30.0
DRAIN_GRACE_S = {ROUTER: 35.0, EDGE: 35.0, AGENT: 2.0}  # beyond the 30 s that router and edge drain by themselves


@dataclass(frozen=True, slots=True)
class Wanted:
    """One process that should run."""

    slot: str
    launch: ProcessLaunch

    @property
    def kind(self) -> str:
        return KINDS[self.launch.program]


@dataclass(frozen=True, slots=True)
class Record:
    """What is remembered of one process between ticks."""

    kind: str
    slot: str
    node: str
    state: str = "STARTING"
    reason: str = ""
    since_s: float = 0.0
    failures: int = 0
    not_before_s: float = 0.0
    grace_s: float = 2.0


@dataclass(frozen=True, slots=True)
class Decision:
    """What one tick decided about processes."""

    records: Mapping[str, Record]
    start: tuple[ProcessLaunch, ...] = ()
    stop: tuple[tuple[str, float], ...] = ()
    """(name, grace in seconds)"""
    changed: tuple[tuple[str, Record], ...] = ()


def wanted_processes(
    spec: ClusterSpec, inventory: Inventory, fleet: Fleet, context: LaunchContext
) -> tuple[Wanted, ...]:
    """Every router, edge and agent that should run on the nodes there are."""
    alive = [node for node in inventory.nodes if node.alive]
    head = next((node for node in alive if node.head), alive[0] if alive else None)
    if head is None:
        return ()
    router_nodes = _nodes(alive, head, spec.routers.count, per_node=spec.routers.per_node)
    found: list[Wanted] = []
    if spec.agents.enabled:
        serving = {node for replica in fleet.replicas if replica.live for node in replica.placement.nodes}
        serving |= {node.id for node in router_nodes} | {head.id}
        for node in alive:
            if node.id in serving:
                slot = _slot("agent", node, head, 0)
                found.append(_wanted(slot, agent_launch(slot, node, spec, context)))
    for node in router_nodes:
        for number in range(spec.routers.count):
            slot = _slot("router", node, head, number)
            found.append(_wanted(slot, router_launch(slot, node, spec, context)))
    if any(model.source for model in spec.models):
        for node in _nodes(alive, head, spec.edge.count, per_node=spec.edge.per_node):
            near = node if node in router_nodes else head
            for number in range(spec.edge.count):
                slot = _slot("edge", node, head, number)
                found.append(_wanted(slot, edge_launch(slot, node, spec, context, near)))
    return tuple(found)


def supervise(
    wanted: Iterable[Wanted], observed: Mapping[str, ProcessObservation], records: Mapping[str, Record], now: float
) -> Decision:
    """What to start and stop so that exactly the wanted processes run."""
    by_name = {entry.launch.name: entry for entry in wanted}
    following: dict[str, Record] = {}
    start: list[ProcessLaunch] = []
    stop: list[tuple[str, float]] = []
    for name, entry in by_name.items():
        seen = observed.get(name, ProcessObservation())
        grace_s = DRAIN_GRACE_S[entry.launch.program]
        record = records.get(name) or Record(entry.kind, entry.slot, entry.launch.node, since_s=now, grace_s=grace_s)
        record = _observe(record, seen, now)
        if seen.phase is Phase.EXITED:
            stop.append((name, 0.0))
        elif seen.phase is Phase.NONE and now >= record.not_before_s:
            start.append(entry.launch)
            record = replace(record, state="STARTING", reason="", since_s=now)
        following[name] = record
    serving_slots = {entry.slot for name, entry in by_name.items() if following[name].state == "READY"}
    wanted_slots = {entry.slot for entry in by_name.values()}
    for name, seen in observed.items():
        if name in by_name:
            continue
        old = records.get(name) or Record("", name.partition(".")[0], seen.node, since_s=now)
        if seen.phase is Phase.EXITED or old.slot not in wanted_slots or old.slot in serving_slots:
            stop.append((name, 0.0 if seen.phase is Phase.EXITED else old.grace_s))
            old = replace(old, state="DRAINING", reason="replaced" if old.slot in wanted_slots else "no longer wanted")
        following[name] = old
    changed = tuple(
        (name, record)
        for name, record in following.items()
        if name not in records or records[name].state != record.state
    )
    return Decision(following, tuple(start), tuple(stop), changed)


def _observe(record: Record, seen: ProcessObservation, now: float) -> Record:
    if seen.phase is Phase.SERVING:
        if record.state != "READY":
            return replace(record, state="READY", reason="", since_s=now)
        if record.failures and now - record.since_s >= SETTLED_S:
            return replace(record, failures=0)
    elif seen.phase is Phase.EXITED and record.state != "FAILED":
        failures = record.failures + 1
        pause_s = doubling_pause_s(failures, BACKOFF_S, BACKOFF_MAX_S)
        reason = seen.reason or "ended"
        return replace(
            record, state="FAILED", reason=reason, since_s=now, failures=failures, not_before_s=now + pause_s
        )
    return record


def _wanted(slot: str, launch: ProcessLaunch) -> Wanted:
    text = json.dumps([launch.settings, dict(launch.env), launch.node], sort_keys=True)
    return Wanted(slot, replace(launch, name=f"{slot}.{hashlib.sha256(text.encode()).hexdigest()[:6]}"))


def _nodes(alive: list[Node], head: Node, count: int, *, per_node: bool) -> list[Node]:
    if not count:
        return []
    return alive if per_node else [head]


def _slot(kind: str, node: Node, head: Node, number: int) -> str:
    """router-0 on the head node, router-NODE-0 elsewhere."""
    return f"{kind}-{number}" if node.id == head.id else f"{kind}-{node.id[:8]}-{number}"
