"""What routers are told: the fleet as a versioned Snapshot. Pure but for the counter it keeps.

The version grows exactly when the content differs. (epoch, version) is kept in the state file; a controller that lost
its file starts a later epoch, so that routers take its word over their older snapshot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from megatoken.cluster.decide.fleet import Fleet, Replica
from megatoken.cluster.decide.replica import ReplicaState
from megatoken.cluster.inventory.topology import Inventory
from megatoken.cluster.spec.model import ModelSpec
from megatoken.v1 import membership_pb2

_PHASES = {
    ReplicaState.READY: membership_pb2.REPLICA_PHASE_READY,
    ReplicaState.DRAINING: membership_pb2.REPLICA_PHASE_DRAINING,
}


def content_of(
    fleet: Fleet,
    models: Iterable[ModelSpec],
    inventory: Inventory,
    routers: Iterable[membership_pb2.RouterMember],
    throughput: membership_pb2.ThroughputGroup | None,
    unix_offset_s: float,
) -> membership_pb2.Snapshot:
    """A Snapshot without (epoch, version). `unix_offset_s` turns the fleet's clock into Unix time."""
    serving = [replica for replica in fleet.replicas if replica.state in _PHASES and replica.facts is not None]
    titles = {node.id: (node.title, node.site) for node in inventory.nodes}
    snapshot = membership_pb2.Snapshot(
        replicas=[_member(replica, titles, unix_offset_s) for replica in serving],
        models=[_model(model, fleet) for model in models],
        routers=list(routers),
    )
    if throughput is not None:
        snapshot.throughput.CopyFrom(throughput)
    return snapshot


class Versions:
    """Numbers snapshots."""

    def __init__(self, epoch: int, version: int) -> None:
        self.current = membership_pb2.Snapshot(epoch=epoch, version=version)
        self.known = False
        """Whether `current` says who serves. Until the first offer it is the last controller's number and no more."""

    def offer(self, content: membership_pb2.Snapshot, write: Callable[[membership_pb2.Snapshot], None]) -> bool:
        """Takes `content` as the present snapshot when it differs; says whether it did.

        `write` puts its number down first: one that it raises for was told to nobody, and is offered again.
        """
        content.epoch, content.version = self.current.epoch, self.current.version
        if content == self.current:
            self.known = True
            return False
        content.version += 1
        write(content)
        self.current, self.known = content, True
        return True


def _member(
    replica: Replica, titles: Mapping[str, tuple[str, str]], unix_offset_s: float
) -> membership_pb2.ReplicaMember:
    facts = replica.facts
    if facts is None:
        raise ValueError(f"replica {replica.id} serves without facts")
    node, site = titles.get(replica.placement.driver_node, (replica.placement.driver_node, ""))
    deadline_s = replica.drain_deadline_s
    return membership_pb2.ReplicaMember(
        replica=replica.id,
        model=replica.model,
        address=facts.address,
        incarnation=facts.incarnation,
        phase=_PHASES[replica.state],
        node=node,
        site=site,
        max_model_len=facts.max_model_len,
        vocab_size=facts.vocab_size,
        max_running=facts.max_running,
        block_size=facts.block_size,
        engine=facts.engine,
        # whole milliseconds: a drifting offset between the clocks must not look like a change
        drain_deadline_unix_s=round(deadline_s + unix_offset_s, 3) if deadline_s is not None else 0.0,
        device_kind=replica.placement.ranks[0].kind,
        devices=len(replica.placement.ranks),
    )


def _model(model: ModelSpec, fleet: Fleet) -> membership_pb2.ModelMember:
    ready = sum(1 for replica in fleet.of_model(model.name) if replica.state is ReplicaState.READY)
    block = fleet.blocked.get(model.name)
    return membership_pb2.ModelMember(
        model=model.name,
        policy=model.policy or "",
        replicas_wanted=model.replicas,
        replicas_ready=ready,
        blocked="" if block is None or block.passes else block.text,
        hold_s=model.autoscale.hold_s if model.autoscale is not None else 0.0,
    )
