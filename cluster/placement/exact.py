"""A bounded exact search, for when choosing one by one leaves a replica out although everything fits. Used by place().

Why: greedy choices of awkward sizes (TP 3 beside TP 5) can paint themselves into a corner, and then an added node could
make a spec unplaceable by inviting a worse first choice. For sizes that divide each other, greedy is already exact.
It searches over counts of free devices per cell, group by group, within a budget of steps; None means "not found".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from megatoken.cluster.placement.free_devices import FreeDevices, Host, ranks_of, refusal
from megatoken.cluster.placement.values import Placement, ReplicaRequest, Separate, TpSpan

MAX_STEPS = 8_000  # about a quarter of a second at worst; the reconciler pays it each tick while something is blocked
MAX_GROUPS = 64
MAX_CELLS = 64


@dataclass(frozen=True, slots=True)
class _Cell:
    host: Host
    domain: str
    devices: int


def search_exact(requests: Sequence[ReplicaRequest], free: FreeDevices) -> dict[str, Placement] | None:
    """A placement for every request, or None when there is none, or none was found within the bounds."""
    cells = [_Cell(host, domain, len(free)) for host in free.hosts for domain, free in sorted(host.cells.items())]
    groups = sum(request.groups for request in requests)
    devices = sum(request.width for request in requests)
    if not cells or groups > MAX_GROUPS or len(cells) > MAX_CELLS or devices > sum(cell.devices for cell in cells):
        return None
    if not _enough_groups(requests, cells):
        return None
    one_cell_each = all(len(host.cells) == 1 for host in free.hosts)
    spans = {request.constraints.tp_span for request in requests if request.tensor > 1}
    if TpSpan.ANY in spans or (TpSpan.NODE in spans and not one_cell_each):
        return None
    search = _Search(requests, free, cells)
    return search.placements() if search.replica(0, 0) else None


def _enough_groups(requests: Sequence[ReplicaRequest], cells: Sequence[_Cell]) -> bool:
    """A bound that rules most hopeless cases out at once: for every size t, the groups of t devices or more need as
    many places as the cells have for groups of t."""
    sizes = Counter({request.tensor: 0 for request in requests})
    for request in requests:
        sizes[request.tensor] += request.groups
    wanted = 0
    for tensor in sorted(sizes, reverse=True):
        wanted += sizes[tensor]
        if wanted > sum(cell.devices // tensor for cell in cells):
            return False
    return True


class _Search:
    """Depth first over replicas, then over a replica's groups; failed states at replica borders are remembered."""

    def __init__(self, requests: Sequence[ReplicaRequest], free: FreeDevices, cells: list[_Cell]) -> None:
        self._requests = requests
        self._cells = cells
        self._free = [cell.devices for cell in cells]
        self._chosen: list[list[int]] = [[] for _ in requests]
        self._steps = 0
        self._failed: set[tuple[object, ...]] = set()
        self._allowed = [self._allowed_cells(request, free) for request in requests]
        self._avoided = {node: Counter(models) for node, models in free.avoided_on.items()}
        self._on_node = {node: Counter(models) for node, models in free.on_node.items()}
        self._in_domain = {domain: Counter(models) for domain, models in free.in_domain.items()}
        self._occupancy_matters = any(r.constraints.avoid or r.constraints.separate != "none" for r in requests)

    def _allowed_cells(self, request: ReplicaRequest, free: FreeDevices) -> list[int]:
        need = request.device_memory_bytes
        return [
            number
            for number, cell in enumerate(self._cells)
            if not refusal(cell.host, request.constraints)
            and not free.clashes(cell.host.node, request.model, request.constraints)
            and len(cell.host.usable(need)[cell.domain]) == cell.devices
        ]

    def replica(self, number: int, first_cell: int) -> bool:
        """Whether replicas `number` and after find a place; `first_cell` keeps equal replicas in cell order."""
        if number == len(self._requests):
            return True
        state = self._state(number, first_cell)
        if state in self._failed or self._steps > MAX_STEPS:
            return False
        request = self._requests[number]
        open_cells = [cell for cell in self._allowed[number] if cell >= first_cell and not self._clashes(request, cell)]
        if self._groups(number, request.groups, open_cells):
            return True
        self._failed.add(state)
        return False

    def _groups(self, number: int, left: int, open_cells: list[int]) -> bool:
        """Places the replica's remaining groups on cells in rising order, tightest first, then goes on."""
        request, chosen = self._requests[number], self._chosen[number]
        if not left:
            self._occupy(request, chosen, +1)
            same_next = number + 1 < len(self._requests) and _alike(request, self._requests[number + 1])
            if self.replica(number + 1, chosen[0] if same_next else 0):
                return True
            self._occupy(request, chosen, -1)
            return False
        self._steps += 1
        if self._steps > MAX_STEPS:
            return False
        fitting = [cell for cell in open_cells if self._free[cell] >= request.tensor]
        for cell in sorted(fitting, key=lambda cell: (self._free[cell] - request.tensor, cell)):
            host = self._cells[cell].host
            rest = [c for c in open_cells if c >= cell and self._may_join(request, host, self._cells[c].host)]
            self._free[cell] -= request.tensor
            chosen.append(cell)
            if self._groups(number, left - 1, rest):
                return True
            chosen.pop()
            self._free[cell] += request.tensor
        return False

    def _may_join(self, request: ReplicaRequest, host: Host, other: Host) -> bool:
        same_site = request.constraints.cross_site or host.node.site == other.node.site
        return host.kind == other.kind and same_site

    def _state(self, number: int, first_cell: int) -> tuple[object, ...]:
        if not self._occupancy_matters:
            return (number, first_cell, tuple(self._free))
        return (number, first_cell, tuple(self._free), tuple(tuple(chosen) for chosen in self._chosen[:number]))

    def _clashes(self, request: ReplicaRequest, cell: int) -> bool:
        node, constraints = self._cells[cell].host.node, request.constraints
        here = self._on_node.get(node.id, Counter())
        if self._avoided.get(node.id, Counter())[request.model] or any(here[other] for other in constraints.avoid):
            return True
        if constraints.separate is Separate.NODE:
            return here[request.model] > 0
        if constraints.separate is Separate.RACK:
            return self._in_domain.get(node.failure_domain, Counter())[request.model] > 0
        return False

    def _occupy(self, request: ReplicaRequest, chosen: Sequence[int], sign: int) -> None:
        nodes = {self._cells[cell].host.node.id: self._cells[cell].host.node for cell in chosen}
        for node in nodes.values():
            self._on_node.setdefault(node.id, Counter())[request.model] += sign
            self._in_domain.setdefault(node.failure_domain, Counter())[request.model] += sign
            for other in request.constraints.avoid:
                self._avoided.setdefault(node.id, Counter())[other] += sign

    def placements(self) -> dict[str, Placement]:
        """The found choice as devices: every cell hands out its lowest indices first."""
        left = [sorted(cell.host.cells[cell.domain]) for cell in self._cells]
        found = {}
        for request, chosen in zip(self._requests, self._chosen, strict=True):
            shares: dict[Host, list[list[int]]] = {}
            for cell in chosen:
                group, left[cell] = left[cell][: request.tensor], left[cell][request.tensor :]
                shares.setdefault(self._cells[cell].host, []).append(group)
            ranks = ranks_of(request, [(host, sorted(groups)) for host, groups in shares.items()])
            found[request.replica] = Placement(request.replica, request.model, ranks, request.constraints.avoid)
        return found


def _alike(one: ReplicaRequest, other: ReplicaRequest) -> bool:
    """Whether two requests may be swapped."""
    same_sizes = (one.tensor, one.pipeline, one.data) == (other.tensor, other.pipeline, other.data)
    same_need = one.device_memory_bytes == other.device_memory_bytes
    return same_sizes and same_need and one.model == other.model and one.constraints == other.constraints
