"""What routers are told: phases, deadlines, and versions that grow exactly with changes."""

import errno
from dataclasses import replace

import pytest

from megatoken.cluster.controller.membership import Versions, content_of
from megatoken.cluster.decide.fleet import Block, Fleet, Replica, WorkerFacts
from megatoken.cluster.decide.replica import ReplicaState
from megatoken.cluster.inventory.topology import Inventory, Node
from megatoken.cluster.placement.place import BlockedKind, Placement, Rank
from megatoken.cluster.spec.model import ModelSpec
from megatoken.v1 import membership_pb2

MODEL = ModelSpec(name="m", engine="simulated", replicas=2, policy="prefix")
INVENTORY = Inventory((Node("n0", "10.0.0.1", name="alpha", site="oslo"),))


def replica(number: int, state: ReplicaState) -> Replica:
    facts = WorkerFacts(f"10.0.0.1:{number}", number, "simulated", "", 100, 200, 8, 16)
    placement = Placement(f"m-{number}", "m", (Rank(0, "n0", number, "mi355x"),))
    return Replica(f"m-{number}", "m", "r", 1, placement, 0.0, state, facts=facts)


def content(*replicas: Replica, blocked: str = "", passes: bool = False) -> membership_pb2.Snapshot:
    fleet = Fleet(tuple(replicas), blocked={"m": Block(BlockedKind.STARTS, blocked, passes)} if blocked else {})
    return content_of(fleet, [MODEL], INVENTORY, [], None, 1000.0)


def test_only_those_that_serve_are_members() -> None:
    snapshot = content(*(replica(number, state) for number, state in enumerate(ReplicaState)))
    assert [(member.replica, member.phase) for member in snapshot.replicas] == [
        ("m-2", membership_pb2.REPLICA_PHASE_READY),
        ("m-3", membership_pb2.REPLICA_PHASE_DRAINING),
    ]
    member = snapshot.replicas[0]
    assert (member.node, member.site, member.device_kind, member.incarnation) == ("alpha", "oslo", "mi355x", 2)
    assert (snapshot.models[0].replicas_wanted, snapshot.models[0].replicas_ready) == (2, 1)
    assert snapshot.models[0].policy == "prefix"


def test_a_drain_deadline_is_told_in_unix_time() -> None:
    draining = replace(replica(1, ReplicaState.DRAINING), drain_deadline_s=50.0)
    assert content(draining).replicas[0].drain_deadline_unix_s == 1050.0


def test_versions_grow_exactly_with_changes() -> None:
    versions = Versions(7, 3)
    written: list[membership_pb2.Snapshot] = []
    one, two = replica(1, ReplicaState.READY), replica(2, ReplicaState.READY)
    assert versions.offer(content(one), written.append)
    assert not versions.offer(content(one), written.append)
    assert (versions.current.epoch, versions.current.version) == (7, 4)
    assert versions.offer(content(one, two), written.append)
    assert versions.offer(content(one), written.append)
    assert versions.current.version == 6
    assert [snapshot.version for snapshot in written] == [4, 5, 6]


def test_a_version_that_could_not_be_written_down_is_told_to_nobody() -> None:
    versions = Versions(7, 3)

    def full(_snapshot: membership_pb2.Snapshot) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    with pytest.raises(OSError, match="no space"):
        versions.offer(content(replica(1, ReplicaState.READY)), full)
    assert versions.current.version == 3
    assert not versions.current.replicas


def test_what_blocks_a_model_reaches_routers_whole() -> None:
    said = "start failed: the text holds '; next try in' itself; and more"
    assert content(blocked=said).models[0].blocked == said
    assert content(blocked=said, passes=True).models[0].blocked == "", "requests wait"
