"""What a cluster is made of, as values: devices, nodes, and the inventory that placement reads.

Decides nothing and reads nothing. The controller's observer builds an Inventory from Ray every tick, `megatoken plan`
builds one from a file (cluster/planning/topology_file.py), and cluster/placement/place.py, cluster/planning/plan.py and
the doctor read it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from megatoken.process.host import host_of

CPU_KIND = "cpu"  # the kind of a CPU node's slots (the Ray resource `cpu_device`)


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator, or one CPU slot of a CPU node."""

    kind: str
    """Lower case, no vendor: "mi355x", "h200", "cpu". Devices of one kind are interchangeable."""
    index: int
    """The physical index on its node, as the driver numbers it."""
    memory_bytes: int = 0
    """Total device memory; 0 when unknown, and then memory is not checked."""
    link_domain: str = ""
    """Devices of a node that share a fast link (xGMI, NVLink, a socket) carry one name; empty: all of the node do."""
    out: str = ""
    """Why the device is left out ("rank died twice here"); empty: it serves."""

    @property
    def healthy(self) -> bool:
        return not self.out


@dataclass(frozen=True, slots=True)
class Node:
    """A machine that Ray runs on."""

    id: str
    """What placements name: Ray's node id in a live cluster, any unique name in a file."""
    address: str
    devices: tuple[Device, ...] = ()
    name: str = ""
    """For people; empty: the id."""
    site: str = ""
    rack: str = ""
    """The failure domain inside a site; empty: the node is its own."""
    labels: Mapping[str, str] = field(default_factory=dict)
    alive: bool = True
    draining: bool = False
    """Alive, but takes nothing new."""
    head: bool = False

    @property
    def title(self) -> str:
        return self.name or self.id

    @property
    def host(self) -> str:
        """The machine, also after its Ray was started again under another id; where nobody does that, the id."""
        return host_of(self.id, self.labels)

    @property
    def failure_domain(self) -> str:
        """What is lost together: the rack in its site, or the node alone where no rack is declared."""
        return f"{self.site}/{self.rack}" if self.rack else f"node:{self.id}"

    def device(self, index: int) -> Device | None:
        return next((device for device in self.devices if device.index == index), None)


@dataclass(frozen=True, slots=True)
class Inventory:
    """Every known node, alive or not. Node ids are unique."""

    nodes: tuple[Node, ...] = ()

    def node(self, node_id: str) -> Node | None:
        return next((node for node in self.nodes if node.id == node_id), None)

    def devices(self) -> Iterator[tuple[Node, Device]]:
        for node in self.nodes:
            for device in node.devices:
                yield node, device
