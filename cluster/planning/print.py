"""A ClusterPlan as text for people, and as JSON for programs. Pure; `megatoken plan` prints it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from megatoken.cluster.inventory.topology import Device, Inventory, Node
from megatoken.cluster.placement.place import Blocked, Rank
from megatoken.cluster.planning.plan import Alternative, ClusterPlan, ModelPlan
from megatoken.cluster.view.human import gib

GIB = 1 << 30
MAX_LINES = 400  # of the table by node; more are counted, not shown


def plan_text(plan: ClusterPlan) -> str:
    """The whole plan: by model, by node and device, what is blocked, what is unused, and the alternatives."""
    sections = [
        _models(plan),
        _by_node(plan),
        *(_blocked(model) for model in plan.models if model.placed < model.wanted),
        _unused(plan),
        *(_alternatives(model) for model in plan.models if model.alternatives),
    ]
    return "\n\n".join(section for section in sections if section)


def plan_json(plan: ClusterPlan) -> dict[str, Any]:
    """The same as plain values; keys are stable."""
    return {
        "complete": plan.complete,
        "models": [_model_json(model) for model in plan.models],
        "placements": [
            {
                "replica": placement.replica,
                "model": placement.model,
                "driver_node": placement.driver_node,
                "ranks": [
                    {"rank": r.rank, "node": r.node, "device": r.device, "kind": r.kind, "data": r.data,
                     "stage": r.stage, "tensor": r.tensor}
                    for r in placement.ranks
                ],
            }
            for placement in plan.placements
        ],
        "unused": [{"node": node.id, "device": device.index, "kind": device.kind} for node, device in plan.unused],
    }  # fmt: skip


def _model_json(model: ModelPlan) -> dict[str, Any]:
    return {
        "model": model.model,
        "wanted": model.wanted,
        "placed": model.placed,
        "problems": list(model.problems),
        "device_need_bytes": model.need_bytes,
        "blocked": [
            {"replica": outcome.replica, "reason": outcome.reason, "unblock": outcome.unblock}
            for outcome in model.outcomes
            if isinstance(outcome, Blocked)
        ],
        "alternatives": [
            {name: getattr(split, name) for name in Alternative.__slots__} for split in model.alternatives
        ],
    }


def _models(plan: ClusterPlan) -> str:
    rows = [
        (
            model.model,
            f"{model.placed} of {model.wanted}",
            gib(model.need_bytes) if model.need_bytes else "unknown",
            "placed" if model.placed == model.wanted else "BLOCKED",
        )
        for model in plan.models
    ]
    return table(("MODEL", "REPLICAS", "MEMORY A RANK", "STATE"), rows)


def _by_node(plan: ClusterPlan) -> str:
    """One line for each run of devices of a node that hold one replica's neighbouring ranks."""
    held = {(rank.node, rank.device): (p.replica, rank) for p in plan.placements for rank in p.ranks}
    rows: list[tuple[str, ...]] = []
    for node in plan.inventory.nodes:
        for first, last, text in _runs(node, held):
            devices = str(first.index) if first is last else f"{first.index}-{last.index}"
            where = "/".join(part for part in (node.site, node.rack) if part)
            rows.append((node.title, where, f"{first.kind} {devices}", text))
    shown = table(("NODE", "SITE/RACK", "DEVICES", "HOLD"), rows[:MAX_LINES])
    if len(rows) > MAX_LINES:
        shown += f"\n... and {len(rows) - MAX_LINES} more lines (--json shows all)"
    return shown


def _runs(node: Node, held: dict[tuple[str, int], tuple[str, Rank]]) -> Iterable[tuple[Device, Device, str]]:
    runs: list[tuple[Device, Device, str, list[Rank]]] = []
    for device in sorted(node.devices, key=lambda device: device.index):
        replica, rank = held.get((node.id, device.index), ("", None))
        what = replica or _idle(node, device)
        if runs and runs[-1][2] == what and runs[-1][1].index + 1 == device.index and runs[-1][1].kind == device.kind:
            first, _, _, ranks = runs.pop()
        else:
            first, ranks = device, []
        runs.append((first, device, what, [*ranks, rank] if rank else ranks))
    for first, last, what, ranks in runs:
        yield first, last, f"{what}  {_ranks(ranks)}" if ranks else what


def _idle(node: Node, device: Device) -> str:
    if not node.alive:
        return "(dead node)"
    if device.out:
        return f"(out: {device.out})"
    return "(draining)" if node.draining else "-"


def _ranks(ranks: Sequence[Rank]) -> str:
    """ "ranks 0-7 (stages 0-1)"."""
    numbers = span([rank.rank for rank in ranks])
    stages = sorted({rank.stage for rank in ranks})
    copies = sorted({rank.data for rank in ranks})
    more = [f"stage{'s' if len(stages) > 1 else ''} {span(stages)}"] if stages != [0] or len(ranks) > 1 else []
    if copies != [0]:
        more.append(f"copy {span(copies)}")
    text = f"rank{'s' if len(ranks) > 1 else ''} {numbers}"
    return f"{text} ({', '.join(more)})" if more else text


def span(numbers: Sequence[int]) -> str:
    """Numbers as ranges: 0-3,7."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and parts[-1][1] + 1 == number:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in parts)


def _blocked(model: ModelPlan) -> str:
    lines = [f"{model.model}: {model.wanted - model.placed} of {model.wanted} replicas are blocked"]
    reasons = dict.fromkeys((o.reason, o.unblock) for o in model.outcomes if isinstance(o, Blocked))
    for reason, unblock in reasons:
        lines += [f"  why:  {reason}", f"  what would help:  {unblock}"]
    return "\n".join(lines)


def _unused(plan: ClusterPlan) -> str:
    total = sum(1 for _ in plan.inventory.devices())
    by_node: dict[str, list[int]] = {}
    for node, device in plan.unused:
        by_node.setdefault(node.title, []).append(device.index)
    shown = [f"{name} {span(indices)}" for name, indices in list(by_node.items())[:12]]
    more = f" and {len(by_node) - 12} more nodes" if len(by_node) > 12 else ""
    listed = f": {'; '.join(shown)}{more}" if shown else ""
    return f"unused: {len(plan.unused)} of {total} devices{listed}{_out(plan.inventory)}"


def _out(inventory: Inventory) -> str:
    out = [f"{node.title} {device.index}: {device.out}" for node, device in inventory.devices() if device.out]
    return f"\nleft out: {'; '.join(out[:12])}" + (f" and {len(out) - 12} more" if len(out) > 12 else "") if out else ""


def _alternatives(model: ModelPlan) -> str:
    best = max(split.rate for split in model.alternatives)
    rows = [
        (
            "->" if split.chosen else "",
            f"TP {split.tensor} x PP {split.pipeline}",
            str(split.replicas),
            split.device_kind,
            str(split.unused),
            f"{gib(split.need_bytes)} of {gib(split.device_bytes)}" if split.device_bytes else gib(split.need_bytes),
            f"{split.kv_tokens:,}" if split.kv_tokens else "unknown",
            f"{split.rate / best:.2f}",
        )
        for split in model.alternatives
    ]
    header = ("", "SPLIT", "REPLICAS", "KIND", "IDLE", "MEMORY A RANK", "KV TOKENS A REPLICA", "EXPECTED")
    note = f"{model.model}: splits that fit the inventory, by expected throughput (1.00: the first; ->: the spec's)"
    return f"{note}\n{table(header, rows)}"


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Columns padded to their widest cell."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (header, *rows)]
    return "\n".join(line.rstrip() for line in lines)
