"""Chooses devices for interchangeable replicas, one after another, in logarithmic time. Used by place.py.

Two indexes over the hosts that may hold a TP group, both kept up as devices go:

- for a replica that one host holds: nested heaps, site -> failure domain -> host. Each entry's key starts with how many
  replicas of the model stand there, so spreading is lexicographic (site, failure domain, node), and ends with what
  would stay free, so the tightest fit wins. A change on a host renews three entries, never a whole site's.
- for one that needs several: zones (racks, sites, or the whole cluster) with their hosts grouped by the TP groups they
  hold; a zone's largest hosts are taken first, which needs the fewest nodes.
"""

from __future__ import annotations

import heapq
from collections import Counter
from dataclasses import dataclass, replace

from megatoken.cluster.placement.free_devices import FreeDevices, Host, ranks_of, refusal
from megatoken.cluster.placement.values import Placement, ReplicaRequest, Separate, TpSpan

Share = tuple[Host, int]  # a host, and how many TP groups go there
Key = tuple[int, ...]


class Chooser:
    """Places replicas of one shape on a floor. Only one chooser may change a floor at a time."""

    def __init__(self, shape: ReplicaRequest, free: FreeDevices, *, spread: bool) -> None:
        self._shape = shape
        self._free = free
        self._spread = spread
        self._span = shape.constraints.tp_span
        hosts = [host for host in free.hosts if not refusal(host, shape.constraints)]
        self._fits = {host: self._count_fits(host) for host in hosts}
        self._single: _Tree | None = None
        if any(fits >= shape.groups for fits in self._fits.values()):
            self._single = _Tree(self, [host for host in hosts if self._fits[host] >= shape.groups])
        self._zones: list[_Zone] | None = None
        self._wider: Chooser | None = None

    def turn_to(self, request: ReplicaRequest) -> bool:
        """Goes on with another replica; False when its shape is another, or its model sees other hosts as open."""
        if replace(request, replica=self._shape.replica, model=self._shape.model) != self._shape:
            return False
        if request.model == self._shape.model:
            return True
        if request.constraints.avoid or self._free.avoided_on or self._wider is not None:
            return False
        nodes = self._free.nodes_of.get(self._shape.model, set()) | self._free.nodes_of.get(request.model, set())
        self._shape = replace(self._shape, model=request.model)
        self._refresh([host for node in nodes for host in self._free.of_node(node)])
        return True

    def place(self, request: ReplicaRequest) -> Placement | None:
        """Takes the devices for one replica of the shape; None when nothing holds it."""
        shares = self._choose()
        if shares is None:
            return self._place_rank_by_rank(request)
        need, span = request.device_memory_bytes, self._span
        taken = [(host, host.take(count, request.tensor, span, need)) for host, count in shares]
        placement = Placement(request.replica, request.model, ranks_of(request, taken), request.constraints.avoid)
        self._free.count(placement)
        self._refresh([host for host, _ in shares])
        return placement

    def _place_rank_by_rank(self, request: ReplicaRequest) -> Placement | None:
        """The last resort of TpSpan.ANY: TP groups run over node borders, ranks still contiguous by node."""
        if self._span is not TpSpan.ANY or request.tensor == 1:
            return None
        if self._wider is None:
            flat = replace(self._shape, tensor=1, pipeline=self._shape.width, data=1)
            self._wider = Chooser(flat, self._free, spread=self._spread)
        flat = replace(request, tensor=1, pipeline=request.width, data=1)
        placement = self._wider.place(flat)
        if placement is None:
            return None
        numbered = []
        for rank in placement.ranks:
            group, tensor = divmod(rank.rank, request.tensor)
            data, stage = divmod(group, request.pipeline)
            numbered.append(replace(rank, data=data, stage=stage, tensor=tensor))
        return replace(placement, ranks=tuple(numbered))

    def _choose(self) -> list[Share] | None:
        if self._single is not None:
            host = self._single.best()
            if host is not None:
                return [(host, self._shape.groups)]
            self._single = None  # free devices only ever go down here, so no single host comes back
        if self._shape.groups == 1:
            return None
        if self._zones is None:
            self._zones = self._make_zones()
        for level in ("rack", "site", "cluster"):
            zones = [zone for zone in self._zones if zone.level == level and zone.total >= self._shape.groups]
            if zones:
                return min(zones, key=self._zone_key).pick(self._shape.groups)
        return None

    def _zone_key(self, zone: _Zone) -> tuple[int, int, int, str]:
        count = zone.models(self._free, self._shape.model) if self._spread else 0
        return (zone.nodes_needed(self._shape.groups), count, zone.total, zone.name)

    def _make_zones(self) -> list[_Zone]:
        zones: dict[tuple[str, str], _Zone] = {}
        for host, fits in self._fits.items():
            node, kind = host.node, host.kind
            names = [("site", node.site)]
            if node.rack:
                names.append(("rack", node.failure_domain))
            if self._shape.constraints.cross_site:
                names.append(("cluster", ""))
            for level, name in names:
                zone = zones.setdefault((level, f"{name}|{kind}"), _Zone(level, name, kind))
                zone.put(host, fits, self.standing(host))
        return list(zones.values())

    def _refresh(self, hosts: list[Host]) -> None:
        """After a placement: recounts its hosts, and every host that the placement now keeps the model from."""
        for host in self._touched(hosts):
            if self._single is not None:
                self._single.renew_above(host)
            if host not in self._fits:
                continue
            before, now = self._fits[host], self._count_fits(host)
            self._fits[host] = now
            if self._single is not None:
                self._single.renew(host)
            for zone in self._zones or ():
                if zone.holds(host):
                    zone.move(host, before, now, self.standing(host))

    def _touched(self, hosts: list[Host]) -> list[Host]:
        if self._shape.constraints.separate is Separate.RACK:
            domains = {host.node.failure_domain for host in hosts}
            return [host for host in self._fits if host.node.failure_domain in domains]
        return [other for node in {host.node.id: None for host in hosts} for other in self._free.of_node(node)]

    def _count_fits(self, host: Host) -> int:
        shape = self._shape
        if self._free.clashes(host.node, shape.model, shape.constraints):
            return 0
        return host.fits(shape.tensor, self._span, shape.device_memory_bytes)

    def standing(self, host: Host) -> int:
        """Replicas of the model on the host's node, when they are to be spread."""
        return self._free.on_node.get(host.node.id, _NONE)[self._shape.model] if self._spread else 0

    def host_key(self, host: Host) -> Key | None:
        """The order of hosts inside one failure domain; None: it does not hold the replica."""
        if self._fits[host] < self._shape.groups:
            return None
        return (self.standing(host), host.free, host.order)

    def domain_count(self, domain: str) -> int:
        return self._free.in_domain.get(domain, _NONE)[self._shape.model] if self._spread else 0

    def site_count(self, site: str) -> int:
        return self._free.in_site.get(site, _NONE)[self._shape.model] if self._spread else 0


_NONE: Counter[str] = Counter()  # read only: Counter's [] does not insert


class _Heap:
    """A heap of named entries whose keys may change: old entries are dropped when they surface."""

    def __init__(self) -> None:
        self._heap: list[tuple[Key, int | str]] = []
        self._keys: dict[int | str, Key] = {}

    def set(self, name: int | str, key: Key | None) -> None:
        if self._keys.get(name) == key:
            return
        if key is None:
            self._keys.pop(name, None)
        else:
            self._keys[name] = key
            heapq.heappush(self._heap, (key, name))

    def top(self) -> tuple[Key, int | str] | None:
        while self._heap and self._keys.get(self._heap[0][1]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0] if self._heap else None


class _Tree:
    """Site -> failure domain -> host, each level ordered by what already stands there, then by its best child."""

    def __init__(self, chooser: Chooser, hosts: list[Host]) -> None:
        self._chooser = chooser
        self._hosts = {host.order: host for host in hosts}
        self._sites = _Heap()
        self._domains: dict[str, _Heap] = {}
        self._leaves: dict[tuple[str, str], _Heap] = {}
        for host in hosts:
            node = host.node
            self._domains.setdefault(node.site, _Heap())
            self._leaves.setdefault((node.site, node.failure_domain), _Heap()).set(host.order, chooser.host_key(host))
        for site, domain in self._leaves:
            self._renew_domain(site, domain)
        for site in self._domains:
            self._renew_site(site)

    def best(self) -> Host | None:
        top = self._sites.top()
        return None if top is None else self._hosts[top[0][-1]]

    def renew(self, host: Host) -> None:
        if host.order not in self._hosts:
            return
        self._leaves[host.node.site, host.node.failure_domain].set(host.order, self._chooser.host_key(host))
        self.renew_above(host)

    def renew_above(self, host: Host) -> None:
        """Renews the host's failure domain and site, whether or not the host itself is a candidate."""
        site, domain = host.node.site, host.node.failure_domain
        if (site, domain) in self._leaves:
            self._renew_domain(site, domain)
            self._renew_site(site)

    def _renew_domain(self, site: str, domain: str) -> None:
        top = self._leaves[site, domain].top()
        key = None if top is None else (self._chooser.domain_count(domain), *top[0])
        self._domains[site].set(domain, key)

    def _renew_site(self, site: str) -> None:
        top = self._domains[site].top()
        self._sites.set(site, None if top is None else (self._chooser.site_count(site), *top[0]))


@dataclass(slots=True, eq=False)
class _Level:
    """The hosts of a zone that hold the same number of groups: a heap, and the entries of it that still hold."""

    heap: list[tuple[int, int]]
    standing: dict[int, int]  # by the host's order


class _Zone:
    """Hosts of one kind in one rack or site (or everywhere), grouped by the TP groups they hold."""

    def __init__(self, level: str, name: str, kind: str) -> None:
        self.level = level
        self.name = f"{name}|{kind}"
        self._place = name
        self.total = 0
        self._levels: dict[int, _Level] = {}
        self._hosts: dict[int, Host] = {}

    def holds(self, host: Host) -> bool:
        return host.order in self._hosts

    def models(self, free: FreeDevices, model: str) -> int:
        table = free.in_domain if self.level == "rack" else free.in_site
        return table.get(self._place, _NONE)[model]

    def put(self, host: Host, fits: int, standing: int) -> None:
        self._hosts[host.order] = host
        if fits:
            level = self._levels.setdefault(fits, _Level([], {}))
            if level.standing.get(host.order) != standing:
                heapq.heappush(level.heap, (standing, host.order))
            level.standing[host.order] = standing
            self.total += fits

    def move(self, host: Host, before: int, now: int, standing: int) -> None:
        if before:
            if before != now:
                self._levels[before].standing.pop(host.order, None)
            self.total -= before
        self.put(host, now, standing)

    def nodes_needed(self, groups: int) -> int:
        nodes = 0
        for fits in sorted(self._levels, reverse=True):
            here = len(self._levels[fits].standing)
            if here * fits >= groups:
                return nodes - (-groups // fits)
            nodes += here
            groups -= here * fits
        return nodes

    def pick(self, groups: int) -> list[Share]:
        """The fewest hosts: the largest first, and the last one the tightest that holds the rest."""
        shares: list[Share] = []
        used: set[int] = set()
        while groups:
            enough = [fits for fits in self._levels if fits >= groups and self._any(fits, used)]
            fits = min(enough) if enough else max(f for f in self._levels if self._any(f, used))
            host = self._first(fits, used)
            shares.append((host, min(fits, groups)))
            used.add(host.order)
            groups -= min(fits, groups)
        driver, *others = shares
        return [driver, *sorted(others, key=lambda share: share[0].order)]

    def _any(self, fits: int, used: set[int]) -> bool:
        standing = self._levels[fits].standing
        return len(standing) > len(used & standing.keys())

    def _first(self, fits: int, used: set[int]) -> Host:
        """The host of that size with the fewest replicas of the model; entries that no longer hold are dropped."""
        level = self._levels[fits]
        kept = []
        while True:
            entry = heapq.heappop(level.heap)
            standing, order = entry
            if level.standing.get(order) != standing:
                continue
            kept.append(entry)
            if order not in used:
                break
        for entry in kept:
            heapq.heappush(level.heap, entry)
        return self._hosts[order]
