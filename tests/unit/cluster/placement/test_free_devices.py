"""What is free on a host, which groups it holds and hands out, and what keeps replicas apart."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatoken.cluster.inventory.topology import Device, Inventory, Node
from megatoken.cluster.placement.free_devices import FreeDevices, Host
from megatoken.cluster.placement.place import Constraints, Placement, Rank, Separate, TpSpan
from tests.support.placements import cluster, linked, node


def mixed(*memory: int) -> Host:
    devices = tuple(Device("x", index, size) for index, size in enumerate(memory))
    return FreeDevices(Inventory((Node("a", "a", devices),))).hosts[0]


@pytest.mark.parametrize(
    ("memory", "need", "usable"),
    [
        ((10, 20), 0, [0, 1]),
        ((10, 20), 9, [0, 1]),
        ((10, 20), 10, [0, 1]),
        ((10, 20), 11, [1]),
        ((10, 20), 20, [1]),
        ((10, 20), 21, []),
        ((0, 20), 21, [0]),
        ((0, 20), 20, [0, 1]),
        ((20, 10), 15, [0]),
    ],
)
def test_devices_with_memory_enough_or_unknown_are_usable(
    memory: tuple[int, ...], need: int, usable: list[int]
) -> None:
    host = mixed(*memory)
    assert host.usable(need) == {"": usable}
    assert host.fits(1, TpSpan.LINK, need) == len(usable)


@pytest.mark.parametrize(
    ("sizes", "tensor", "link", "any_link"),
    [((4, 4), 4, 2, 2), ((3, 3), 2, 2, 3), ((3, 3), 4, 0, 1), ((1, 1), 1, 2, 2), ((7,), 2, 3, 3), ((2,), 3, 0, 0)],
)
def test_groups_are_counted_by_link_domain_or_by_node(
    sizes: tuple[int, ...], tensor: int, link: int, any_link: int
) -> None:
    (host,) = FreeDevices(cluster(linked("a", *sizes))).hosts
    assert (host.fits(tensor, TpSpan.LINK, 0), host.fits(tensor, TpSpan.NODE, 0)) == (link, any_link)


@pytest.mark.parametrize(
    ("sizes", "count", "tensor", "span", "taken"),
    [
        ((4, 2), 1, 2, TpSpan.LINK, [[4, 5]]),
        ((4, 2), 2, 2, TpSpan.LINK, [[0, 1], [4, 5]]),
        ((2, 2), 1, 2, TpSpan.LINK, [[0, 1]]),
        ((4, 2), 1, 2, TpSpan.NODE, [[4, 5]]),
        ((2, 2), 1, 2, TpSpan.NODE, [[0, 1]]),
        ((2, 4), 1, 5, TpSpan.NODE, [[0, 2, 3, 4, 5]]),
        ((1, 2, 3), 1, 5, TpSpan.NODE, [[1, 2, 3, 4, 5]]),
        ((2, 2, 2), 1, 3, TpSpan.NODE, [[0, 1, 2]]),
        ((3, 2), 2, 2, TpSpan.NODE, [[0, 1], [3, 4]]),
    ],
)
def test_the_tightest_cell_is_taken_and_as_few_as_hold_a_wide_group(
    sizes: tuple[int, ...], count: int, tensor: int, span: TpSpan, taken: list[list[int]]
) -> None:
    (host,) = FreeDevices(cluster(linked("a", *sizes))).hosts
    assert host.take(count, tensor, span, 0) == taken
    assert host.free == sum(sizes) - count * tensor
    assert not {index for cell in host.cells.values() for index in cell} & {index for group in taken for index in group}


def test_hosts_come_by_node_and_kind_and_only_of_nodes_that_take_something() -> None:
    both = Node("b", "b", (Device("z", 0), Device("y", 1), Device("y", 2, out="bad")))
    away = [node("c", alive=False), node("d", draining=True)]
    stands = Placement("m-0", "m", (Rank(0, "a", 0, "mi355x"),))
    free = FreeDevices(cluster(both, *away, node("a", 2)), [stands])
    assert [(host.order, host.node.id, host.kind, host.free) for host in free.hosts] == [
        (0, "a", "mi355x", 1),
        (1, "b", "y", 1),
        (2, "b", "z", 1),
    ]
    assert free.of_node("b") == free.hosts[1:]
    assert free.of_node("c") == []
    assert free.eligible_devices(Constraints()) == 3
    assert free.eligible_devices(Constraints(device_kinds=("y",))) == 1
    assert free.eligible_devices(Constraints(nodes=("a", "b"))) == 3


def test_a_node_id_given_twice_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="names a node id twice"):
        FreeDevices(cluster(node("a"), node("a")))


def test_what_stands_is_counted_once_a_replica_in_each_node_rack_and_site() -> None:
    nodes = [node(name, site="s", rack="r") for name in "ab"]
    wide = Placement("m-0", "m", (Rank(0, "a", 0, "mi355x"), Rank(1, "b", 0, "mi355x"), Rank(2, "b", 1, "mi355x")))
    narrow = Placement("m-1", "m", (Rank(0, "a", 1, "mi355x"),))
    free = FreeDevices(cluster(*nodes), [wide, narrow])
    assert {name: dict(count) for name, count in free.on_node.items()} == {"a": {"m": 2}, "b": {"m": 1}}
    assert {name: dict(count) for name, count in free.in_domain.items()} == {"s/r": {"m": 2}}
    assert {name: dict(count) for name, count in free.in_site.items()} == {"s": {"m": 2}}
    assert free.nodes_of == {"m": {"a", "b"}}


@pytest.mark.parametrize(
    ("constraints", "model", "clashing"),
    [
        (Constraints(), "n", ""),
        (Constraints(avoid=("m",)), "n", "a"),
        (Constraints(avoid=("x", "m")), "n", "a"),
        (Constraints(separate=Separate.NODE), "m", "a"),
        (Constraints(separate=Separate.NODE), "n", ""),
        (Constraints(separate=Separate.RACK), "m", "ab"),
        (Constraints(separate=Separate.RACK), "n", ""),
        (Constraints(), "shunned", "a"),
        (Constraints(), "m", ""),
    ],
)
def test_what_stands_on_a_node_or_in_its_rack_keeps_others_away(
    constraints: Constraints, model: str, clashing: str
) -> None:
    nodes = [node("a", rack="r"), node("b", rack="r"), node("c", rack="s")]
    stands = replace(Placement("m-0", "m", (Rank(0, "a", 0, "mi355x"),)), avoid=("shunned",))
    free = FreeDevices(cluster(*nodes), [stands])
    assert "".join(found.id for found in nodes if free.clashes(found, model, constraints)) == clashing
