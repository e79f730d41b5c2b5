"""The free devices while placements are being made. Used by place.py and its search modules only.

A host is the part of a node that one kind of device makes up. Its free devices lie in cells, one per link domain.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from megatoken.cluster.inventory.topology import Inventory, Node
from megatoken.cluster.placement.values import Constraints, Placement, Rank, ReplicaRequest, Separate, TpSpan


@dataclass(slots=True, eq=False)
class Host:
    """The devices of one kind on one node. `order` is its place in the inventory's fixed order."""

    order: int
    node: Node
    kind: str
    cells: dict[str, list[int]]
    """Free and healthy device indices by link domain, rising."""
    memory: dict[int, int]
    """Bytes by device index; 0 unknown."""
    least_memory: int

    @property
    def free(self) -> int:
        return sum(map(len, self.cells.values()))

    def usable(self, need_bytes: int) -> dict[str, list[int]]:
        """The free devices with memory enough, by link domain. A device of unknown memory is taken at its word."""
        if need_bytes <= self.least_memory or not need_bytes:
            return self.cells
        memory = self.memory
        return {
            domain: [index for index in cell if not memory[index] or memory[index] >= need_bytes]
            for domain, cell in self.cells.items()
        }

    def fits(self, tensor: int, span: TpSpan, need_bytes: int) -> int:
        """How many TP groups find place here now."""
        cells = self.usable(need_bytes).values()
        if span is TpSpan.LINK:
            return sum(len(cell) // tensor for cell in cells)
        return sum(map(len, cells)) // tensor

    def take(self, count: int, tensor: int, span: TpSpan, need_bytes: int) -> list[list[int]]:
        """Takes devices for `count` groups: from the tightest cell that holds one, lowest indices first."""
        groups = []
        for _ in range(count):
            usable = self.usable(need_bytes)
            if span is TpSpan.LINK:
                cell = min((c for c in usable.values() if len(c) >= tensor), key=lambda c: (len(c), c[0]))
                group = cell[:tensor]
            else:
                group = _few_cells(list(usable.values()), tensor)
            self.release_from_free(group)
            groups.append(group)
        return sorted(groups)

    def release_from_free(self, devices: Sequence[int]) -> None:
        gone = set(devices)
        for cell in self.cells.values():
            if not gone.isdisjoint(cell):
                cell[:] = [index for index in cell if index not in gone]


def _few_cells(cells: list[list[int]], count: int) -> list[int]:
    """`count` devices from as few cells as possible; rising."""
    whole = [cell for cell in cells if len(cell) >= count]
    if whole:
        return min(whole, key=lambda c: (len(c), c[0]))[:count]
    group: list[int] = []
    for cell in sorted((c for c in cells if c), key=lambda c: (-len(c), c[0])):
        group += cell[: count - len(group)]
    return sorted(group)


class FreeDevices:
    """Free devices, and which models stand where. Hosts are ordered by node id, then kind."""

    def __init__(self, inventory: Inventory, existing: Sequence[Placement] = ()) -> None:
        self.inventory = inventory
        self.hosts: list[Host] = []
        self.on_node: dict[str, Counter[str]] = {}
        self.in_domain: dict[str, Counter[str]] = {}
        self.in_site: dict[str, Counter[str]] = {}
        self.nodes_of: dict[str, set[str]] = {}
        """Nodes by the models that stand on them."""
        self.avoided_on: dict[str, set[str]] = {}
        """Models that a replica standing on the node does not want beside it."""
        self._by_node: dict[str, list[Host]] = {}
        self._nodes = {node.id: node for node in inventory.nodes}
        if len(self._nodes) != len(inventory.nodes):
            raise ValueError("the inventory names a node id twice")
        taken: dict[str, set[int]] = {}
        for placement in existing:
            for rank in placement.ranks:
                taken.setdefault(rank.node, set()).add(rank.device)
        for node in sorted(inventory.nodes, key=lambda node: node.id):
            if node.alive and not node.draining:
                self._add_hosts(node, taken.get(node.id, set()))
        for placement in existing:
            self.count(placement)

    def _add_hosts(self, node: Node, taken: set[int]) -> None:
        by_kind: dict[str, Host] = {}
        for device in sorted(node.devices, key=lambda device: device.index):
            if device.out:
                continue
            host = by_kind.get(device.kind)
            if host is None:
                host = by_kind[device.kind] = Host(0, node, device.kind, {}, {}, device.memory_bytes)
            if device.index not in taken:
                host.cells.setdefault(device.link_domain, []).append(device.index)
            host.memory[device.index] = device.memory_bytes
            host.least_memory = min(host.least_memory, device.memory_bytes)
        for kind in sorted(by_kind):
            by_kind[kind].order = len(self.hosts)
            self.hosts.append(by_kind[kind])
            self._by_node.setdefault(node.id, []).append(by_kind[kind])

    def count(self, placement: Placement) -> None:
        """Remembers what stands where, for spreading and for avoidance; devices are taken by Host.take."""
        model = placement.model
        domains, sites = set(), set()
        for node_id in placement.nodes:
            self.on_node.setdefault(node_id, Counter())[model] += 1
            self.nodes_of.setdefault(model, set()).add(node_id)
            if placement.avoid:
                self.avoided_on.setdefault(node_id, set()).update(placement.avoid)
            node = self._nodes.get(node_id)
            if node is not None:
                domains.add(node.failure_domain)
                sites.add(node.site)
        for domain in domains:
            self.in_domain.setdefault(domain, Counter())[model] += 1
        for site in sites:
            self.in_site.setdefault(site, Counter())[model] += 1

    def clashes(self, node: Node, model: str, constraints: Constraints) -> bool:
        """Whether what stands on the node, or in its failure domain, keeps a replica of `model` away."""
        here = self.on_node.get(node.id)
        if model in self.avoided_on.get(node.id, ()):
            return True
        if here and any(here[other] for other in constraints.avoid):
            return True
        if constraints.separate is Separate.NODE:
            return bool(here and here[model])
        if constraints.separate is Separate.RACK:
            return bool(self.in_domain.get(node.failure_domain, Counter())[model])
        return False

    def of_node(self, node_id: str) -> list[Host]:
        """The hosts of a node; none when it takes nothing new."""
        return self._by_node.get(node_id, [])

    def eligible_devices(self, constraints: Constraints) -> int:
        """Free devices on hosts that the constraints allow."""
        return sum(host.free for host in self.hosts if not refusal(host, constraints))


def refusal(host: Host, constraints: Constraints) -> str:
    """The first constraint that rules the host out whatever stands on it; empty: none."""
    node = host.node
    if constraints.device_kinds and host.kind not in constraints.device_kinds:
        return "device kind"
    if constraints.sites and node.site not in constraints.sites:
        return "site"
    if constraints.nodes and not {node.id, node.name, node.address} & set(constraints.nodes):
        return "node"
    if any(node.labels.get(key) != value for key, value in constraints.labels):
        return "label"
    return ""


def ranks_of(request: ReplicaRequest, shares: Sequence[tuple[Host, list[list[int]]]]) -> tuple[Rank, ...]:
    """Numbers the ranks: groups in the order of the hosts, vLLM's rank order inside (see place.py)."""
    ranks: list[Rank] = []
    devices = ((host, index) for host, groups in shares for group in groups for index in group)
    for number, (host, index) in enumerate(devices):
        group, tensor = divmod(number, request.tensor)
        data, stage = divmod(group, request.pipeline)
        ranks.append(Rank(number, host.node.id, index, host.kind, data, stage, tensor))
    return tuple(ranks)
