"""Small clusters and requests, and what place() makes of them."""

from __future__ import annotations

from dataclasses import replace

from megatoken.cluster.inventory.topology import Device, Inventory, Node
from megatoken.cluster.placement.place import Blocked, Placement, ReplicaRequest, place

GIB = 1 << 30


def node(name: str, devices: int = 8, *, kind: str = "mi355x", out: tuple[int, ...] = (), **fields: object) -> Node:
    found = tuple(Device(kind, i, 288 * GIB, out="driver error" if i in out else "") for i in range(devices))
    return Node(id=name, address=name, devices=found, **fields)  # type: ignore[arg-type]


def linked(name: str, *sizes: int) -> Node:
    """A node with as many link domains as sizes, each of so many devices."""
    domains = [str(domain) for domain, size in enumerate(sizes) for _ in range(size)]
    devices = tuple(Device("mi355x", i, 288 * GIB, link_domain=domain) for i, domain in enumerate(domains))
    return Node(id=name, address=name, devices=devices)


def cluster(*nodes: Node) -> Inventory:
    return Inventory(nodes)


def wanted(count: int, model: str = "m", tensor: int = 1, pipeline: int = 1, **fields: object) -> list[ReplicaRequest]:
    shape = ReplicaRequest("", model, tensor, pipeline, **fields)  # type: ignore[arg-type]
    return [replace(shape, replica=f"{model}-{number}") for number in range(count)]


def all_placed(requests: list[ReplicaRequest], inventory: Inventory, *existing: Placement) -> list[Placement]:
    outcomes = place(requests, inventory, existing)
    assert not [outcome for outcome in outcomes if isinstance(outcome, Blocked)]
    return [outcome for outcome in outcomes if isinstance(outcome, Placement)]


def only_blocked(requests: list[ReplicaRequest], inventory: Inventory) -> Blocked:
    blocked = [outcome for outcome in place(requests, inventory) if isinstance(outcome, Blocked)]
    assert blocked
    return blocked[0]
