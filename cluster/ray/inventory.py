"""Ray's list of nodes as an Inventory. Pure; backend.py calls it with what `ray.nodes()` returned.

Devices of a node: its GPUs, of the kind that Ray names (`accelerator_type:KIND`), or else its `cpu_device` slots. Node
labels `site`, `rack` and `link_domains` (sizes in device order, "4-4") say what Ray does not know.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from megatoken.cluster.inventory.topology import CPU_KIND, Device, Inventory, Node

CPU_RESOURCE = "cpu_device"
HEAD_RESOURCE = "node:__internal_head__"
ACCELERATOR_PREFIX = "accelerator_type:"
VENDOR_WORDS = ("nvidia-", "amd-instinct-", "amd-", "intel-", "instinct-")
GIB = 1 << 30
MAX_DEVICES = 4096  # a node; a wrong resource must not make a huge inventory


def inventory_of(
    nodes: Iterable[Mapping[str, Any]],
    *,
    draining: frozenset[str] = frozenset(),
    out: Mapping[tuple[str, int], str] | None = None,
) -> Inventory:
    """Every node Ray knows. `draining`: node ids taken out of service. `out`: (node id, index) -> why."""
    return Inventory(tuple(_node(entry, draining, out or {}) for entry in nodes))


def _node(entry: Mapping[str, Any], draining: frozenset[str], out: Mapping[tuple[str, int], str]) -> Node:
    node_id = str(entry["NodeID"])
    labels = {str(name): str(value) for name, value in entry.get("Labels", {}).items()}
    resources = entry.get("Resources", {})
    name = str(entry.get("NodeName") or "")
    address = str(entry.get("NodeManagerAddress", ""))
    return Node(
        id=node_id,
        address=address,
        devices=_devices(node_id, resources, labels, out),
        name=name if name and name != address else labels.get("node", "") or address,
        site=labels.get("site", ""),
        rack=labels.get("rack", ""),
        labels={name: value for name, value in labels.items() if not name.startswith("ray.io/node-id")},
        alive=bool(entry.get("Alive", False)),
        draining=node_id in draining,
        head=HEAD_RESOURCE in resources,
    )


def _devices(
    node_id: str, resources: Mapping[str, float], labels: Mapping[str, str], out: Mapping[tuple[str, int], str]
) -> tuple[Device, ...]:
    gpus = int(resources.get("GPU", 0))
    if gpus:
        kind, count = _gpu_kind(resources, labels), gpus
    else:
        kind, count = CPU_KIND, int(resources.get(CPU_RESOURCE, 0))
    domains = link_domains(labels.get("link_domains", ""), count)
    memory = memory_bytes(labels.get("device_memory_gib", ""))
    return tuple(
        Device(kind, index, memory, domains[index], out.get((node_id, index), ""))
        for index in range(min(count, MAX_DEVICES))
    )


def _gpu_kind(resources: Mapping[str, float], labels: Mapping[str, str]) -> str:
    named = labels.get("device_kind") or labels.get("ray.io/accelerator-type") or ""
    if not named:
        named = next(
            (name.removeprefix(ACCELERATOR_PREFIX) for name in resources if name.startswith(ACCELERATOR_PREFIX)), "gpu"
        )
    kind = named.lower().replace("_", "-").replace(" ", "-")
    for word in VENDOR_WORDS:
        kind = kind.removeprefix(word)
    return kind


def link_domains(sizes: str, count: int) -> list[str]:
    """ "4-4" puts devices 0-3 in one domain and 4-7 in the next; anything else is one domain.

    A comma works in an inventory that is not Ray's: Ray refuses it in a label's value.
    """
    domains: list[str] = []
    for number, size in enumerate(part for part in sizes.replace("-", ",").split(",") if part.strip().isdigit()):
        domains += [str(number)] * min(int(size), MAX_DEVICES)
    return domains if len(domains) == count else [""] * count


def memory_bytes(gib: str) -> int:
    try:
        return max(0, int(float(gib) * GIB))
    except (ValueError, OverflowError):
        return 0
