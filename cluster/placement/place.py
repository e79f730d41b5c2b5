"""Maps replicas onto nodes and devices. Pure: the same inputs give the same answer, and nothing is started.

Who calls it: the reconciler, for replicas that have no place yet; `megatoken plan`, for a whole spec. What it holds to:

- A TP group stays on one node and inside one link domain, unless the request's `tp_span` allows more.
- A replica's groups (PP stages, then data-parallel copies) go to as few nodes as hold them, all of one device kind and,
  unless `cross_site` allows more, in one site; one rack is preferred.
- Ranks are contiguous by node, the driver's node first. vLLM numbers rank = (data * pipeline + stage) * tensor + t, and
  its Ray executor sorts bundles driver node first, then by Ray node id (get_bundles_sorted_by_node in vLLM 0.32). The
  order here is that same order where node ids are Ray's; VLLM_RAY_BUNDLE_INDICES = Placement.bundle_indices pins it.
  Device indices rise with the rank on each node, because that executor hands a node's sorted devices to its ranks.
- Replicas of a model spread over sites, failure domains and nodes; among equals the tightest fit wins, which leaves
  the largest gaps for wide replicas. In one call, wide replicas choose first.
- Devices that are out, and nodes that are dead or draining, take nothing new. Existing placements are never moved.
- What fits is found: where choosing one by one fails, packing is tried, and then, for small problems, a bounded exact
  search. Where not everything fits, the first replica of every model comes before the second of any.
- What cannot be placed is Blocked: why, and what would unblock it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from megatoken.cluster.inventory.topology import Inventory
from megatoken.cluster.placement.blocked import explain
from megatoken.cluster.placement.choice import Chooser
from megatoken.cluster.placement.exact import search_exact
from megatoken.cluster.placement.free_devices import FreeDevices
from megatoken.cluster.placement.values import (
    Blocked,
    BlockedKind,
    Constraints,
    Outcome,
    Placement,
    Rank,
    ReplicaRequest,
    Separate,
    TpSpan,
)

__all__ = [
    "Blocked",
    "BlockedKind",
    "Constraints",
    "Outcome",
    "Placement",
    "Rank",
    "ReplicaRequest",
    "Separate",
    "TpSpan",
    "place",
]


def place(
    requests: Sequence[ReplicaRequest], inventory: Inventory, existing: Sequence[Placement] = ()
) -> tuple[Outcome, ...]:
    """One outcome per request, in the order of the requests.

    `existing` are the placements that hold devices now (starting, running or draining); they stay as they are. Replica
    ids among requests and existing must be unique. Cost: about
    O((nodes + replicas) log nodes) for each shape of replica.
    """
    _require_valid(requests, existing)
    free = FreeDevices(inventory, existing)
    order = _widest_first(requests, free)
    for spread in (True, False):
        found = _greedy(order, FreeDevices(inventory, existing), spread=spread)
        if len(found) == len(requests):
            return tuple(found[request.replica] for request in requests)
    exact = search_exact(order, free)
    if exact is not None:
        return tuple(exact[request.replica] for request in requests)
    return _partial(requests, order, FreeDevices(inventory, existing), existing)


def _partial(
    requests: Sequence[ReplicaRequest],
    order: Sequence[ReplicaRequest],
    free: FreeDevices,
    existing: Sequence[Placement],
) -> tuple[Outcome, ...]:
    """Not everything fits: the first replica of each model, wide ones first, and then the rest."""
    running = {placement.model for placement in existing}
    first: dict[str, str] = {}
    for request in requests:
        if request.model not in running:
            first.setdefault(request.model, request.replica)
    chosen = set(first.values())
    found = _greedy([request for request in order if request.replica in chosen], free, spread=True)
    found |= _greedy([request for request in order if request.replica not in chosen], free, spread=True)
    reasons: dict[ReplicaRequest, tuple[BlockedKind, str, str]] = {}
    outcomes: list[Outcome] = []
    for request in requests:
        placement = found.get(request.replica)
        if placement is None:
            like = replace(request, replica="")
            if like not in reasons:
                reasons[like] = explain(request, free)
            outcomes.append(Blocked(request.replica, request.model, *reasons[like]))
        else:
            outcomes.append(placement)
    return tuple(outcomes)


def _greedy(order: Iterable[ReplicaRequest], free: FreeDevices, *, spread: bool) -> dict[str, Placement]:
    """Places one by one on `floor`, which it uses up; those that find no place are left out."""
    found: dict[str, Placement] = {}
    chooser: Chooser | None = None
    for request in order:
        if chooser is None or not chooser.turn_to(request):
            chooser = Chooser(request, free, spread=spread)
        placement = chooser.place(request)
        if placement is not None:
            found[request.replica] = placement
    return found


def _widest_first(requests: Sequence[ReplicaRequest], free: FreeDevices) -> list[ReplicaRequest]:
    """Widest TP group, then widest replica, then the one with the fewest devices to choose from; like beside like."""
    choice = {rules: (free.eligible_devices(rules), repr(rules)) for rules in {r.constraints for r in requests}}

    def key(request: ReplicaRequest) -> tuple[int, int, tuple[int, str], int, int, str]:
        rules = choice[request.constraints]
        return (-request.tensor, -request.width, rules, request.pipeline, request.device_memory_bytes, request.model)

    return sorted(requests, key=key)


def _require_valid(requests: Sequence[ReplicaRequest], existing: Sequence[Placement]) -> None:
    for request in requests:
        if min(request.tensor, request.pipeline, request.data) < 1:
            raise ValueError(f"replica {request.replica}: parallel sizes must be at least 1")
    counts = Counter([request.replica for request in requests] + [placement.replica for placement in existing])
    twice = [replica for replica, count in counts.items() if count > 1]
    if twice:
        raise ValueError(f"replica {twice[0]} appears twice among requests and existing placements")
