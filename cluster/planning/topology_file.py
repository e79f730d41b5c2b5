"""An inventory written by hand, for planning without a cluster: `megatoken plan --inventory nodes.json`.

JSON or YAML: {"nodes": [{"id": "node-{n}", "count": 11, "device_kind": "mi355x", "devices": 8, "rack": "r1"}]}
"""

from __future__ import annotations

from pathlib import Path

import pydantic
import yaml
from pydantic import Field

from megatoken.cluster.inventory.topology import CPU_KIND, Device, Inventory, Node
from megatoken.cluster.spec.load import SpecError
from megatoken.cluster.spec.model import SpecPart

GIB = 1 << 30
MAX_FILE_BYTES = 64 << 20


class NodeEntry(SpecPart):
    """One node, or `count` equal ones."""

    id: str = Field(min_length=1, max_length=128, description="unique; {n} stands for the number, from 0")
    count: int = Field(1, ge=1, le=100_000, description="nodes that this entry stands for")
    address: str = Field("", description="empty: the id")
    site: str = Field("", description="where it stands")
    rack: str = Field("", description="failure domain; {n} works here too")
    labels: dict[str, str] = Field(default_factory=dict, description="node labels")
    device_kind: str = Field(CPU_KIND, min_length=1, description='e.g. "mi355x", "h200", "cpu"')
    devices: int = Field(ge=0, le=4096, description="devices, or CPU slots")
    device_memory_gib: float = Field(0.0, ge=0, le=100_000, description="of each device; 0: not checked")
    link_domains: tuple[int, ...] = Field((), description="sizes in device order, e.g. [4, 4]; empty: one domain")
    out: dict[int, str] = Field(default_factory=dict, description="devices left out, and why")
    draining: bool = Field(False, description="takes nothing new")

    def nodes(self) -> list[Node]:
        """The nodes that the entry stands for."""
        return [self._node(number) for number in range(self.count)]

    def _node(self, number: int) -> Node:
        domains = [str(domain) for domain, size in enumerate(self.link_domains) for _ in range(size)]
        memory = int(self.device_memory_gib * GIB)
        name = self.id.replace("{n}", str(number))
        return Node(
            id=name,
            address=self.address.replace("{n}", str(number)) or name,
            devices=tuple(
                Device(
                    self.device_kind.lower(), index, memory, domains[index] if domains else "", self.out.get(index, "")
                )
                for index in range(self.devices)
            ),
            site=self.site,
            rack=self.rack.replace("{n}", str(number)),
            labels=self.labels,
            draining=self.draining,
        )


class InventoryFile(SpecPart):
    """The whole file."""

    nodes: tuple[NodeEntry, ...] = Field(min_length=1, description="nodes in any order")


def load_inventory(path: Path) -> Inventory:
    """Reads the file. Raises SpecError with one line for each thing that is wrong."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise SpecError([f"{path}: larger than {MAX_FILE_BYTES} bytes is not allowed"])
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise SpecError([f"{path}: cannot be read: {error.strerror}"]) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpecError([f"{path}: neither JSON nor YAML: {' '.join(str(error).split())}"]) from None
    try:
        entries = InventoryFile.model_validate(content).nodes
    except pydantic.ValidationError as error:
        lines = [f"{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in error.errors(include_url=False)]
        raise SpecError([f"{path}: {line}" for line in lines]) from None
    problems = [problem for entry in entries for problem in _problems(entry)]
    nodes = [] if problems else [node for entry in entries for node in entry.nodes()]
    seen: set[str] = set()
    for node in nodes:
        if node.id in seen:
            problems.append(f"id: {node.id!r} is given twice; put {{n}} into the id of an entry with a count")
            break
        seen.add(node.id)
    if problems:
        raise SpecError([f"{path}: {problem}" for problem in problems])
    return Inventory(tuple(nodes))


def _problems(entry: NodeEntry) -> list[str]:
    problems = []
    if entry.link_domains and sum(entry.link_domains) != entry.devices:
        problems.append(
            f"{entry.id}.link_domains: {list(entry.link_domains)} is not allowed; sizes that add up to {entry.devices}"
        )
    for index in entry.out:
        if not 0 <= index < entry.devices:
            problems.append(f"{entry.id}.out: {index} is not allowed; a device from 0 to {entry.devices - 1}")
    return problems
