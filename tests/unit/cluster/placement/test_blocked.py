"""What is said of a replica without a place: the kind, the reason and what would give it one, to the word."""

from __future__ import annotations

import pytest

from megatoken.cluster.inventory.topology import Device, Inventory, Node
from megatoken.cluster.placement.place import (
    Blocked,
    BlockedKind,
    Constraints,
    Placement,
    Rank,
    ReplicaRequest,
    Separate,
    TpSpan,
    place,
)
from tests.support.placements import GIB, cluster, linked, node, only_blocked, wanted


@pytest.mark.parametrize(
    ("requests", "inventory", "kind", "reason", "unblock"),
    [
        (wanted(1), cluster(), BlockedKind.CAPACITY, "Needs 1 device, and the cluster has no nodes.", "Add a node."),
        (
            wanted(1, tensor=2),
            cluster(),
            BlockedKind.CAPACITY,
            "Needs 2 devices, and the cluster has no nodes.",
            "Add a node.",
        ),
        (
            wanted(1, constraints=Constraints(device_kinds=("h200", "h100"))),
            cluster(node("a"), node("b", kind="mi300x")),
            BlockedKind.CONSTRAINT,
            "Needs 1 device, but no node has devices of kind h200 or h100 (there is: mi300x, mi355x).",
            "Add such a node, or change the constraint on devices.",
        ),
        (
            wanted(1),
            cluster(node("a", 0)),
            BlockedKind.CAPACITY,
            "Needs 1 device, but no node has devices (there is: none).",
            "Add a node with devices.",
        ),
        (
            wanted(1, constraints=Constraints(sites=("mars", "moon"))),
            cluster(node("a", site="east"), node("b")),
            BlockedKind.CONSTRAINT,
            "Needs 1 device, but no node has site mars or moon (there is: east, no site).",
            "Add such a node, or change the constraint on site.",
        ),
        (
            wanted(1, constraints=Constraints(nodes=("z",))),
            cluster(*(node(x) for x in "edcba")),
            BlockedKind.CONSTRAINT,
            "Needs 1 device, but no node has name z (there is: a, b, c, d and 1 more).",
            "Add such a node, or change the constraint on name.",
        ),
        (
            wanted(1, constraints=Constraints(nodes=("z",))),
            cluster(*(node(x) for x in "dcba")),
            BlockedKind.CONSTRAINT,
            "Needs 1 device, but no node has name z (there is: a, b, c, d).",
            "Add such a node, or change the constraint on name.",
        ),
        (
            wanted(1, constraints=Constraints(nodes=("z",))),
            cluster(*(node(x) for x in "fedcba")),
            BlockedKind.CONSTRAINT,
            "Needs 1 device, but no node has name z (there is: a, b, c, d and 2 more).",
            "Add such a node, or change the constraint on name.",
        ),
        (
            wanted(1, constraints=Constraints(labels=(("tier", "gold"),))),
            cluster(node("a")),
            BlockedKind.CONSTRAINT,
            "Needs 1 device, but no node has label tier=gold (there is: none).",
            "Add such a node, or change the constraint on label.",
        ),
        (
            wanted(1, constraints=Constraints(device_kinds=("h200",), sites=("east",))),
            cluster(node("a", site="east"), node("b", kind="h200", site="west")),
            BlockedKind.CONSTRAINT,
            "Needs 1 device, but no node has site east (there is: west).",
            "Add such a node, or change the constraint on site.",
        ),
        (
            wanted(1, tensor=2, device_memory_bytes=288 * GIB + 1),
            cluster(node("a")),
            BlockedKind.MEMORY,
            "Needs 2 devices with 288.0 GiB on each, but the largest allowed device has 288.0 GiB.",
            "Raise the tensor or pipeline size, lower max_model_len, use smaller weights, or add larger devices.",
        ),
        (
            wanted(9, device_memory_bytes=288 * GIB),
            cluster(node("a")),
            BlockedKind.CAPACITY,
            "Needs 1 device (TP 1 x PP 1), but only 0 devices stand free on the 1 node it may use.",
            "Free or add 1 device in whole TP groups of 1.",
        ),
        (
            wanted(1, tensor=5),
            cluster(linked("a", 4, 4)),
            BlockedKind.TOPOLOGY,
            "Needs 5 devices in TP groups of 5, but no link domain has more than 4 devices.",
            "Lower the tensor size to 4 or less, or allow a TP group to reach further (tp_span).",
        ),
        (
            wanted(1, tensor=9, constraints=Constraints(tp_span=TpSpan.NODE)),
            cluster(linked("a", 4, 4)),
            BlockedKind.TOPOLOGY,
            "Needs 9 devices in TP groups of 9, but no node has more than 8 devices.",
            "Lower the tensor size to 8 or less, or allow a TP group to reach further (tp_span).",
        ),
        (
            wanted(1, tensor=9, constraints=Constraints(tp_span=TpSpan.ANY)),
            cluster(linked("a", 4, 4)),
            BlockedKind.CAPACITY,
            "Needs 9 devices (TP 9 x PP 1), but only 8 devices stand free on the 1 node it may use.",
            "Free or add 9 devices in whole TP groups of 9.",
        ),
        (
            wanted(1, tensor=2),
            cluster(node("a", 1)),
            BlockedKind.TOPOLOGY,
            "Needs 2 devices in TP groups of 2, but no link domain has more than 1 device.",
            "Lower the tensor size to 1 or less, or allow a TP group to reach further (tp_span).",
        ),
        (
            wanted(2, tensor=8),
            cluster(node("a")),
            BlockedKind.CAPACITY,
            "Needs 8 devices (TP 8 x PP 1), but only 0 devices stand free on the 1 node it may use.",
            "Free or add 8 devices in whole TP groups of 8.",
        ),
        (
            wanted(1, tensor=2, pipeline=2, data=2),
            cluster(node("a", 6)),
            BlockedKind.CAPACITY,
            "Needs 8 devices (TP 2 x PP 2 x DP 2), but only 6 devices stand free on the 1 node it may use.",
            "Free or add 2 devices in whole TP groups of 2.",
        ),
        (
            wanted(1, tensor=2, pipeline=2),
            cluster(node("a", 3), node("b", 1)),
            BlockedKind.TOPOLOGY,
            "Needs 4 devices (TP 2 x PP 2), but only 4 devices stand free on the 2 nodes it may use, "
            "in gaps that hold 1 of its 2 TP groups.",
            "Free or add 2 devices in whole TP groups of 2.",
        ),
        (
            wanted(1, tensor=2, pipeline=2),
            cluster(node("a", 2, site="x"), node("b", 2, site="y")),
            BlockedKind.TOPOLOGY,
            "Needs 4 devices (TP 2 x PP 2), but only 4 devices stand free on the 2 nodes it may use, "
            "in gaps that hold 2 of its 2 TP groups together, but not in one site and of one kind.",
            "Free or add 2 devices in whole TP groups of 2.",
        ),
        (
            wanted(2, constraints=Constraints(separate=Separate.NODE)),
            cluster(node("a")),
            BlockedKind.CONSTRAINT,
            "Needs 1 device (TP 1 x PP 1), but only 0 devices stand free on the 0 nodes it may use; a "
            "stand apart by anti-affinity.",
            "Free or add 1 device in whole TP groups of 1, or loosen the anti-affinity.",
        ),
        (
            wanted(2, tensor=6, constraints=Constraints(separate=Separate.NODE)),
            cluster(node("a")),
            BlockedKind.CAPACITY,
            "Needs 6 devices (TP 6 x PP 1), but only 0 devices stand free on the 0 nodes it may use; a "
            "stand apart by anti-affinity.",
            "Free or add 6 devices in whole TP groups of 6, or loosen the anti-affinity.",
        ),
        (
            wanted(7),
            cluster(node("a", out=(1, 5))),
            BlockedKind.CAPACITY,
            "Needs 1 device (TP 1 x PP 1), but only 0 devices stand free on the 1 node it may use; "
            "left out: a device 1 (driver error), a device 5 (driver error).",
            "Free or add 1 device in whole TP groups of 1, or bring back the devices that are left out.",
        ),
        (
            wanted(9),
            cluster(
                node("a"),
                node("b", alive=False, out=(1,)),
                node("c", draining=True),
                node("d", alive=False, draining=True),
            ),
            BlockedKind.CAPACITY,
            "Needs 1 device (TP 1 x PP 1), but only 0 devices stand free on the 1 node it may use; "
            "dead: b, d; draining: c.",
            "Free or add 1 device in whole TP groups of 1, or bring back the dead nodes, or end the drain.",
        ),
        (
            wanted(9, constraints=Constraints(device_kinds=("mi355x",))),
            cluster(node("a")),
            BlockedKind.CAPACITY,
            "Needs 1 device (TP 1 x PP 1), but only 0 devices stand free on the 1 node it may use.",
            "Free or add 1 mi355x device in whole TP groups of 1.",
        ),
        (
            wanted(1, pipeline=10),
            cluster(node("a", 9)),
            BlockedKind.CAPACITY,
            "Needs 10 devices (TP 1 x PP 10), but only 9 devices stand free on the 1 node it may use.",
            "Free or add 1 device in whole TP groups of 1.",
        ),
    ],
)
def test_the_reason_and_the_way_out_are_whole_sentences(
    requests: list[ReplicaRequest], inventory: Inventory, kind: BlockedKind, reason: str, unblock: str
) -> None:
    blocked = only_blocked(requests, inventory)
    assert (blocked.kind, blocked.reason, blocked.unblock) == (kind, reason, unblock)


@pytest.mark.parametrize(("memory", "too_small"), [(0, False), (1, True)])
def test_memory_that_is_unknown_is_never_called_too_small(memory: int, too_small: bool) -> None:
    devices = (Device("mi355x", 0, memory), Device("mi355x", 1, 10))
    blocked = only_blocked(wanted(3, device_memory_bytes=11), Inventory((Node("a", "a", devices),)))
    assert (blocked.kind is BlockedKind.MEMORY) is too_small


@pytest.mark.parametrize(("devices", "kind"), [(1, BlockedKind.CAPACITY), (2, BlockedKind.CONSTRAINT)])
def test_anti_affinity_is_the_cause_when_without_it_the_devices_would_do(devices: int, kind: BlockedKind) -> None:
    stands = Placement("n-0", "n", (Rank(0, "a", 0, "mi355x"),), avoid=("m",))
    (outcome,) = place(wanted(1, tensor=2), cluster(node("a", devices + 1)), [stands])
    assert isinstance(outcome, Blocked)
    assert outcome.kind is kind
