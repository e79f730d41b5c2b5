"""Says why a replica has no place, and what would give it one. Pure; called by place() for what is left over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from megatoken.cluster.inventory.topology import Device, Node
from megatoken.cluster.placement.free_devices import FreeDevices, Host, refusal
from megatoken.cluster.placement.values import BlockedKind, ReplicaRequest, TpSpan

DEVICES = "devices"  # what every replica asks for, with or without constraints
Explanation = tuple[BlockedKind, str, str]


def explain(request: ReplicaRequest, free: FreeDevices) -> Explanation:
    """Why, and what would unblock it, each a sentence, from the floor as it is after all other placements."""
    nodes = free.inventory.nodes
    if not nodes:
        return BlockedKind.CAPACITY, f"{_need(request)}, and the cluster has no nodes.", "Add a node."
    steps = _static(request, nodes)
    if steps:
        return steps
    hosts = [host for host in free.hosts if not refusal(host, request.constraints)]
    clashing = [h for h in hosts if free.clashes(h.node, request.model, request.constraints)]
    hosts = [host for host in hosts if host not in clashing]
    return _capacity(request, nodes, hosts, clashing)


def _static(request: ReplicaRequest, nodes: Sequence[Node]) -> Explanation | None:
    """Reasons that hold however empty the cluster is: nothing carries what the constraints or the memory ask for."""
    wanted = request.constraints
    devices = [(node, device) for node in nodes for device in node.devices]
    for title, kept, known in _filters(request, devices):
        if not kept:
            return (
                BlockedKind.CAPACITY if title == DEVICES else BlockedKind.CONSTRAINT,
                f"{_need(request)}, but no node has {title} (there is: {_listed(known)}).",
                "Add a node with devices."
                if title == DEVICES
                else f"Add such a node, or change the constraint on {title.split(' ')[0]}.",
            )
        devices = kept
    need = request.device_memory_bytes
    largest = max((device.memory_bytes for _, device in devices), default=0)
    if need and largest and all(0 < device.memory_bytes < need for _, device in devices):
        return (
            BlockedKind.MEMORY,
            f"{_need(request)} with {_gib(need)} on each, but the largest allowed device has {_gib(largest)}.",
            "Raise the tensor or pipeline size, lower max_model_len, use smaller weights, or add larger devices.",
        )
    most = _most_on_one_link(devices, wanted.tp_span)
    if wanted.tp_span is not TpSpan.ANY and most < request.tensor:
        where = "link domain" if wanted.tp_span is TpSpan.LINK else "node"
        return (
            BlockedKind.TOPOLOGY,
            f"{_need(request)} in TP groups of {request.tensor}, but no {where} has more than {_devices(most)}.",
            f"Lower the tensor size to {most} or less, or allow a TP group to reach further (tp_span).",
        )
    return None


def _filters(
    request: ReplicaRequest, devices: list[tuple[Node, Device]]
) -> list[tuple[str, list[tuple[Node, Device]], set[str]]]:
    """Each constraint in turn: what it asks for, the devices that have it, and what there is instead."""
    wanted = request.constraints
    steps: list[tuple[str, list[tuple[Node, Device]], set[str]]] = []
    left = devices
    if wanted.device_kinds:
        kept = [pair for pair in left if pair[1].kind in wanted.device_kinds]
        steps.append((f"devices of kind {' or '.join(wanted.device_kinds)}", kept, {d.kind for _, d in left}))
        left = kept
    if wanted.sites:
        kept = [pair for pair in left if pair[0].site in wanted.sites]
        steps.append((f"site {' or '.join(wanted.sites)}", kept, {node.site or "no site" for node, _ in left}))
        left = kept
    if wanted.nodes:
        kept = [pair for pair in left if {pair[0].id, pair[0].name, pair[0].address} & set(wanted.nodes)]
        steps.append((f"name {' or '.join(wanted.nodes)}", kept, {node.title for node, _ in left}))
        left = kept
    for key, value in wanted.labels:
        kept = [pair for pair in left if pair[0].labels.get(key) == value]
        known = {f"{key}={node.labels[key]}" for node, _ in left if key in node.labels}
        steps.append((f"label {key}={value}", kept, known))
        left = kept
    if not wanted.device_kinds:
        steps.append((DEVICES, left, {node.title for node, _ in left}))
    return steps


def _most_on_one_link(devices: list[tuple[Node, Device]], span: TpSpan) -> int:
    groups = Counter(
        (node.id, device.kind, device.link_domain if span is TpSpan.LINK else "") for node, device in devices
    )
    return max(groups.values(), default=0)


def _capacity(
    request: ReplicaRequest, nodes: Sequence[Node], hosts: Sequence[Host], clashing: Sequence[Host]
) -> Explanation:
    """It would fit on an empty, healthy cluster, or on a larger one of the same make; now it does not."""
    need, span, tensor = request.device_memory_bytes, request.constraints.tp_span, request.tensor
    fits = sum(host.fits(tensor, span, need) for host in hosts)
    free = sum(host.free for host in hosts)
    what = f"{_need(request)} ({_groups(request)})"
    reason = f"{what}, but only {_devices(free)} stand free on the {len(hosts)} node{_s(len(hosts))} it may use"
    kind = BlockedKind.CAPACITY
    if free >= request.width:
        kind = BlockedKind.TOPOLOGY
        reason += f", in gaps that hold {fits} of its {request.groups} TP groups"
        if fits >= request.groups:
            reason += " together, but not in one site and of one kind"
    hints = []
    down = [node.title for node in nodes if not node.alive]
    leaving = [node.title for node in nodes if node.alive and node.draining]
    out = [f"{node.title} device {d.index} ({d.out})" for node in nodes if node.alive for d in node.devices if d.out]
    if clashing:
        names = _listed({host.node.title for host in clashing})
        reason += f"; {names} stand apart by anti-affinity"
        if free + sum(host.free for host in clashing) >= request.width:
            kind = BlockedKind.CONSTRAINT
        hints.append("loosen the anti-affinity")
    if out:
        reason += f"; left out: {_listed(out)}"
        hints.append("bring back the devices that are left out")
    if down:
        reason += f"; dead: {_listed(down)}"
        hints.append("bring back the dead nodes")
    if leaving:
        reason += f"; draining: {_listed(leaving)}"
        hints.append("end the drain")
    kinds = " or ".join(request.constraints.device_kinds)
    missing = max(request.groups - fits, 1) * tensor
    which = f" {kinds}" if kinds else ""
    hints = [f"Free or add {missing}{which} device{_s(missing)} in whole TP groups of {tensor}", *hints]
    return kind, reason + ".", ", or ".join(hints) + "."


def _need(request: ReplicaRequest) -> str:
    return f"Needs {_devices(request.width)}"


def _groups(request: ReplicaRequest) -> str:
    sizes = [f"TP {request.tensor}", f"PP {request.pipeline}"]
    if request.data > 1:
        sizes.append(f"DP {request.data}")
    return " x ".join(sizes)


def _devices(count: int) -> str:
    return f"{count} device{_s(count)}"


def _s(count: int) -> str:
    return "" if count == 1 else "s"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def _listed(names: Sequence[str] | set[str], most: int = 4) -> str:
    """A few names; then how many more."""
    ordered = sorted(names)
    shown = ", ".join(ordered[:most]) or "none"
    return shown if len(ordered) <= most else f"{shown} and {len(ordered) - most} more"
