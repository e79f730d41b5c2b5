"""The published ClusterStatus, from the fleet and what the processes themselves say. Pure; the controller calls it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from megatoken.cluster.decide.backend import ProcessObservation
from megatoken.cluster.decide.fleet import Block, Fleet, Replica
from megatoken.cluster.decide.processes import Record
from megatoken.cluster.decide.replica import FINAL, ReplicaState
from megatoken.cluster.inventory.topology import Inventory, Node
from megatoken.cluster.placement.text import rank_text
from megatoken.cluster.spec.model import ModelSpec
from megatoken.v1 import control_pb2, tokens_pb2


@dataclass(frozen=True, slots=True)
class Readings:
    """What workers and routers last said of themselves."""

    loads: Mapping[str, tokens_pb2.Load] = field(default_factory=dict)
    """By replica."""
    rates: Mapping[str, float] = field(default_factory=dict)
    """Generated tokens/s by replica, smoothed."""
    queued: int = 0
    """Requests queued in routers."""
    start_phases: Mapping[str, str] = field(default_factory=dict)
    """By replica that starts: what it does now."""


def node_statuses(inventory: Inventory, fleet: Fleet, drained: Iterable[str]) -> list[control_pb2.NodeStatus]:
    """Every node, alive ones first."""
    held: dict[str, int] = {}
    for replica in fleet.replicas:
        if replica.live:
            for rank in replica.placement.ranks:
                held[rank.node] = held.get(rank.node, 0) + 1
    out = frozenset(drained)
    nodes = sorted(inventory.nodes, key=lambda node: (not node.alive, not node.head, node.title))
    return [_node(node, held.get(node.id, 0), out) for node in nodes]


def _node(node: Node, used: int, drained: frozenset[str]) -> control_pb2.NodeStatus:
    if not node.alive:
        state = "dead"
    elif node.host in drained:
        state = "draining" if used else "drained"
    else:
        state = "alive"
    kinds = sorted({device.kind for device in node.devices})
    return control_pb2.NodeStatus(
        node=node.title,
        address=node.address,
        site=node.site,
        state=state,
        device_kind=", ".join(kinds),
        devices=len(node.devices),
        devices_used=used if node.alive else 0,
        devices_out=[f"{device.index}: {device.out}" for device in node.devices if device.out],
        labels={**node.labels, "node_id": node.id},
    )


def replica_statuses(
    fleet: Fleet, models: Mapping[str, ModelSpec], inventory: Inventory, readings: Readings, now: float
) -> list[control_pb2.ReplicaStatus]:
    """Live replicas first, then ended ones, each oldest first."""
    ordered = sorted(fleet.replicas, key=lambda replica: (replica.state in FINAL, replica.model, replica.created_s))
    return [_replica(replica, models.get(replica.model), inventory, readings, now) for replica in ordered]


def _replica(
    replica: Replica, model: ModelSpec | None, inventory: Inventory, readings: Readings, now: float
) -> control_pb2.ReplicaStatus:
    facts = replica.facts
    node = inventory.node(replica.placement.driver_node)
    status = control_pb2.ReplicaStatus(
        replica=replica.id,
        model=replica.model,
        state=replica.state.value,
        reason=replica.reason,
        engine=facts.engine if facts else (model.engine if model else ""),
        address=facts.address if facts and replica.live else "",
        ranks=[rank_text(rank, inventory) for rank in replica.placement.ranks],
        age_s=max(0.0, now - replica.created_s),
        incarnation=facts.incarnation if facts else 0,
        spec_generation=replica.generation,
        metrics_address=facts.metrics_address if facts else "",
        node=node.title if node else replica.placement.driver_node,
        start_phase=readings.start_phases.get(replica.id, "") if replica.state is ReplicaState.STARTING else "",
        start_phases=[
            control_pb2.StartPhase(phase=name, seconds=seconds) for name, seconds in (facts.start_s if facts else ())
        ],
    )
    load = readings.loads.get(replica.id)
    if load is not None and replica.live:
        status.running, status.waiting, status.kv_usage = load.running, load.waiting, load.kv_usage
        status.generated_tokens = load.generated_tokens
        status.generated_tokens_per_s = readings.rates.get(replica.id, 0.0)
    return status


def model_statuses(
    fleet: Fleet,
    models: Iterable[ModelSpec],
    replicas: Iterable[control_pb2.ReplicaStatus],
    readings: Readings,
    autoscaling: Mapping[str, control_pb2.Autoscaling],
    now: float,
) -> list[control_pb2.ModelStatus]:
    """Every wanted model. Requests queued in routers count for the only model, as routers do not split them."""
    wanted = list(models)
    rows = list(replicas)
    found = []
    for model in wanted:
        own = [row for row in rows if row.model == model.name and row.state not in FINAL]
        block = fleet.blocked.get(model.name)
        found.append(
            control_pb2.ModelStatus(
                model=model.name,
                wanted=model.replicas,
                ready=sum(1 for row in own if row.state == ReplicaState.READY),
                blocked=_blocked_text(block, fleet.retry_s(model.name), now),
                blocked_kind=block.kind if block else "",
                rollout=fleet.rollouts.get(model.name, ""),
                running=sum(row.running for row in own),
                waiting=sum(row.waiting for row in own) + (readings.queued if len(wanted) == 1 else 0),
                generated_tokens_per_s=sum(row.generated_tokens_per_s for row in own),
                source=model.source,
                engine=model.engine,
                autoscaling=autoscaling.get(model.name),
            )
        )
    return found


def _blocked_text(block: Block | None, retry_s: float | None, now: float) -> str:
    """Why fewer run than wanted; where a start waits after failures, for how long."""
    text = block.text if block else ""
    return text if retry_s is None else f"{text}; next try in {max(0.0, retry_s - now):.0f} s"


def process_statuses(
    records: Mapping[str, Record], observed: Mapping[str, ProcessObservation], inventory: Inventory
) -> list[control_pb2.ProcessStatus]:
    """Routers, edges and agents, by name."""
    found = []
    for name, record in sorted(records.items()):
        facts = (observed[name].facts if name in observed else None) or {}
        serving = record.state in ("READY", "DRAINING")
        node = inventory.node(record.node)
        found.append(
            control_pb2.ProcessStatus(
                name=name,
                kind=record.kind,
                node=node.title if node else record.node,
                state=record.state,
                reason=record.reason,
                address=str(facts.get("address") or "") if serving else "",
                metrics_address=str(facts.get("metrics_address") or "") if serving else "",
                own_address=str(facts.get("own_address") or "") if serving else "",
            )
        )
    return found
