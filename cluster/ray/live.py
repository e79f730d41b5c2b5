"""The inventory of a running cluster, as its controller's status tells it, for `megatoken plan`. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from megatoken.cluster.inventory.topology import Device, Inventory, Node
from megatoken.cluster.ray.inventory import link_domains, memory_bytes
from megatoken.v1 import control_pb2


def live_inventory(nodes: Iterable[control_pb2.NodeStatus]) -> Inventory:
    """Nodes with what labels say of their devices. What runs on them is not held against the plan."""
    return Inventory(tuple(_node(status) for status in nodes))


def _node(status: control_pb2.NodeStatus) -> Node:
    labels = dict(status.labels)
    out = {}
    for entry in status.devices_out:
        index, _, why = entry.partition(": ")
        if index.isdigit():
            out[int(index)] = why or "left out"
    domains = link_domains(labels.get("link_domains", ""), status.devices)
    memory = memory_bytes(labels.get("device_memory_gib", ""))
    return Node(
        id=labels.get("node_id", status.node),
        address=status.address,
        devices=tuple(
            Device(status.device_kind, index, memory, domains[index], out.get(index, ""))
            for index in range(status.devices)
        ),
        name=status.node,
        site=status.site,
        rack=labels.get("rack", ""),
        labels=labels,
        alive=status.state != "dead",
        draining=status.state in ("draining", "drained"),
    )
