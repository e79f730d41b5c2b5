"""How long planning takes: 1,000 replicas over 1,000 nodes of 8 devices, and its growth from 10 nodes.

Prints a table and writes bench-results/plan.json: plan_s (the slowest mix at 1,000 nodes) and each mix's growth.
Times are the best of three, in one process, so that a shared machine disturbs them least.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from megatoken.cluster.inventory.topology import Device, Inventory, Node
from megatoken.cluster.placement.place import Placement, ReplicaRequest, place
from tests.bench.bars import Bar, lines, rows, status

SIZES = (10, 30, 100, 300, 1000)
DEVICES = 8
BARS = (Bar("plan_s", 2.0, False, "seconds for 1,000 replicas on 1,000 nodes x 8 devices, the slowest mix"),)
RESULTS = Path("bench-results/plan.json")

ONE_EACH = "TP 4, a model for each replica"
MODELS = 12

# Each mix fills the cluster with as many replicas as nodes: (tensor, pipeline), repeated over models.
MIXES: dict[str, tuple[tuple[int, int], ...]] = {
    "TP 8": ((8, 1),),
    "TP 4 x PP 2": ((4, 2),),
    "TP 8 x PP 2, half of the replicas blocked": ((8, 2),),
    "TP 1, 2, 4 and 8, TP 8 x PP 2": ((1, 1), (2, 1), (4, 1), (8, 1), (8, 1), (8, 2)),
    "TP 3 x PP 2, awkward": ((3, 2),),
    ONE_EACH: ((4, 1),),
}


def inventory(nodes: int) -> Inventory:
    """Racks of 20 nodes in two sites, every device healthy."""
    devices = tuple(Device("mi355x", index, 288 << 30) for index in range(DEVICES))
    return Inventory(
        tuple(
            Node(
                id=f"node-{number:04}",
                address=f"10.0.{number // 256}.{number % 256}",
                devices=devices,
                site="east" if number % 40 < 20 else "west",
                rack=f"rack-{number // 20:02}",
            )
            for number in range(nodes)
        )
    )


def requests(count: int, shapes: tuple[tuple[int, int], ...], models: int) -> list[ReplicaRequest]:
    found = []
    for number in range(count):
        model = number % models
        tensor, pipeline = shapes[model % len(shapes)]
        found.append(ReplicaRequest(f"r{number}", f"m{model}", tensor=tensor, pipeline=pipeline))
    return found


def measure(nodes: int, shapes: tuple[tuple[int, int], ...], models: int) -> tuple[float, int]:
    """(best seconds of three, replicas placed)"""
    cluster, wanted = inventory(nodes), requests(nodes, shapes, models)
    best, placed = float("inf"), 0
    for _ in range(3):
        started = time.perf_counter()
        outcomes = place(wanted, cluster)
        best = min(best, time.perf_counter() - started)
        placed = sum(isinstance(outcome, Placement) for outcome in outcomes)
    return best, placed


def main() -> int:
    growth = {}
    print(f"{'mix':44}" + "".join(f"{nodes:>9}" for nodes in SIZES) + "   placed at the largest")
    for name, shapes in MIXES.items():
        measured = [measure(nodes, shapes, nodes if name == ONE_EACH else MODELS) for nodes in SIZES]
        growth[name] = {str(nodes): round(seconds, 4) for nodes, (seconds, _) in zip(SIZES, measured, strict=True)}
        print(f"{name:44}" + "".join(f"{seconds:8.3f}s" for seconds, _ in measured) + f"   {measured[-1][1]}")
    slowest = max(row[str(SIZES[-1])] for row in growth.values())
    RESULTS.parent.mkdir(exist_ok=True)
    found = {"plan_s": slowest, "growth_s": growth, "devices_a_node": DEVICES}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    judged = rows(BARS, found)
    print("\n".join(lines(judged)))
    return status(judged)


if __name__ == "__main__":
    sys.exit(main())
