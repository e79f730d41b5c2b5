"""How a device is checked before it serves again: loaded by itself, then in an all-reduce with other nodes. Pure.

One peer that the all-reduce succeeds with is enough: where it fails with one and succeeds with another, the first
peer is the one that is ill. On accelerators it runs between devices that are free, since one in use may have no memory
left for it; with none free it runs over the hosts' network, which still finds a node that engines cannot join.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from megatoken.cluster.decide.device_health import Place
from megatoken.cluster.inventory.topology import CPU_KIND, Inventory, Node

PEERS: Final = 2


@dataclass(frozen=True, slots=True)
class Peer:
    """Another node to reduce with."""

    node: str
    title: str
    address: str
    device: int | None
    """None: over the hosts' network."""


@dataclass(frozen=True, slots=True)
class DeviceCheck:
    """One device, and whom to ask for an all-reduce; without peers it is only loaded."""

    place: Place
    kind: str
    address: str
    """Of its node."""
    peers: tuple[Peer, ...] = ()


def check_of(place: Place, inventory: Inventory, held: Collection[Place]) -> DeviceCheck | None:
    """None for a device that no living node has. `held`: devices that replicas are on."""
    node = inventory.node(place[0])
    device = node.device(place[1]) if node is not None and node.alive else None
    if node is None or device is None:
        return None
    peers = [
        Peer(other.id, other.title, other.address, _free(other, device.kind, held))
        for other in inventory.nodes
        if other.id != node.id and other.alive and any(entry.kind == device.kind for entry in other.devices)
    ]
    by_site = {other.id: other.site != node.site for other in inventory.nodes}
    peers.sort(key=lambda peer: (by_site[peer.node], peer.device is None, peer.node))
    return DeviceCheck(place, device.kind, node.address, tuple(peers[:PEERS]))


def _free(node: Node, kind: str, held: Collection[Place]) -> int | None:
    """A device that serves and that nobody is on."""
    if kind == CPU_KIND:
        return None
    free = (device.index for device in node.devices if device.kind == kind and device.healthy)
    return next((index for index in free if (node.id, index) not in held), None)
