"""With whom a device is checked before it serves again."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatoken.cluster.decide.device_check import DeviceCheck, Peer, check_of
from megatoken.cluster.inventory.topology import CPU_KIND, Device, Inventory, Node

H200 = tuple(Device("h200", index) for index in range(2))


def node(name: str, devices: tuple[Device, ...] = H200, **fields: str | bool) -> Node:
    return replace(Node(name, f"10.0.0.{name[-1]}", devices, name=f"host-{name}"), **fields)


def peers(*nodes: Node, held: frozenset[tuple[str, int]] = frozenset()) -> list[tuple[str, int | None]]:
    """(node, device) of the peers of device 1 of node a0."""
    check = check_of(("a0", 1), Inventory((node("a0", site="x"), *nodes)), held)
    assert check is not None
    return [(peer.node, peer.device) for peer in check.peers]


def test_a_peer_is_named_with_its_address_and_the_kind_comes_from_the_device() -> None:
    check = check_of(("a0", 1), Inventory((node("a0"), node("b1"))), frozenset())
    assert check == DeviceCheck(("a0", 1), "h200", "10.0.0.0", (Peer("b1", "host-b1", "10.0.0.1", 0),))


def test_the_reduction_is_between_free_devices_that_serve_and_else_between_hosts() -> None:
    ill = (Device("h200", 0, out="cordoned"), H200[1])
    assert peers(node("b1"), held=frozenset({("b1", 0)})) == [("b1", 1)]
    assert peers(node("b1", ill)) == [("b1", 1)]
    assert peers(node("b1", ill), held=frozenset({("b1", 1)})) == [("b1", None)]
    slots = (Device(CPU_KIND, 0), Device(CPU_KIND, 1))
    check = check_of(("a0", 1), Inventory((node("a0", slots), node("b1", slots))), frozenset())
    assert check is not None
    assert [(peer.node, peer.device) for peer in check.peers] == [("b1", None)]


def test_two_peers_are_asked_those_of_the_same_site_and_with_a_free_device_first() -> None:
    there = [node("b1"), node("c2", site="x"), node("d3", site="x"), node("e4", site="x")]
    busy = frozenset({("c2", 0), ("c2", 1)})
    assert peers(*there, held=busy) == [("d3", 0), ("e4", 0)]
    assert peers(*there[:3], held=busy) == [("d3", 0), ("c2", None)]


@pytest.mark.parametrize("other", [node("b1", (Device("mi355x", 0),)), node("b1", alive=False), node("b1", ())])
def test_a_node_that_is_away_or_has_no_such_device_is_no_peer(other: Node) -> None:
    assert peers(other) == []


def test_a_device_that_no_living_node_has_is_not_checked() -> None:
    assert check_of(("a0", 2), Inventory((node("a0"),)), frozenset()) is None
    assert check_of(("z9", 0), Inventory((node("a0"),)), frozenset()) is None
    assert check_of(("a0", 0), Inventory((node("a0", alive=False),)), frozenset()) is None
