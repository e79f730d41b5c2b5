"""The exact search by itself: it finds what fits, says None of what does not, and keeps to its bounds."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatoken.cluster.inventory.topology import Device, Inventory, Node
from megatoken.cluster.placement.exact import search_exact
from megatoken.cluster.placement.free_devices import FreeDevices
from megatoken.cluster.placement.place import Constraints, Placement, Rank, ReplicaRequest, Separate, TpSpan
from tests.support.placements import GIB, cluster, linked, node, wanted

APART = Constraints(separate=Separate.NODE)
RACKS = Constraints(separate=Separate.RACK)
SHY = Constraints(avoid=("n",))
SPAN = Constraints(tp_span=TpSpan.NODE)


def found(requests: list[ReplicaRequest], inventory: Inventory, *existing: Placement) -> dict[str, list[str]] | None:
    """Each replica's devices as "node:index", in rank order."""
    placements = search_exact(requests, FreeDevices(inventory, existing))
    if placements is None:
        return None
    return {name: [f"{rank.node}:{rank.device}" for rank in placed.ranks] for name, placed in placements.items()}


@pytest.mark.parametrize(
    ("requests", "inventory", "expected"),
    [
        (wanted(1), cluster(node("a", 1)), {"m-0": ["a:0"]}),
        (wanted(1, tensor=2), cluster(node("a", 2)), {"m-0": ["a:0", "a:1"]}),
        (wanted(1, tensor=2), cluster(node("a", 3), node("b", 2)), {"m-0": ["b:0", "b:1"]}),
        (wanted(2, tensor=2), cluster(node("a", 4)), {"m-0": ["a:0", "a:1"], "m-1": ["a:2", "a:3"]}),
        (wanted(1, tensor=2, pipeline=2), cluster(node("a", 2), node("b", 2)), {"m-0": ["a:0", "a:1", "b:0", "b:1"]}),
        (
            [*wanted(1, "x", tensor=5), *wanted(2, "y", tensor=4), *wanted(1, "z", tensor=3)],
            cluster(node("a", 8), node("b", 5), node("c", 3)),
            {
                "x-0": ["b:0", "b:1", "b:2", "b:3", "b:4"],
                "y-0": ["a:0", "a:1", "a:2", "a:3"],
                "y-1": ["a:4", "a:5", "a:6", "a:7"],
                "z-0": ["c:0", "c:1", "c:2"],
            },
        ),
        (
            [*wanted(1, "x", tensor=3), *wanted(2, "y", tensor=2)],
            cluster(node("a", 3), node("b", 4)),
            {"x-0": ["a:0", "a:1", "a:2"], "y-0": ["b:0", "b:1"], "y-1": ["b:2", "b:3"]},
        ),
        (
            [*wanted(1, "p"), *wanted(1, "n", constraints=Constraints(nodes=("a",)))],
            cluster(node("a", 1), node("b", 1)),
            {
                "p-0": ["b:0"],
                "n-0": ["a:0"],
            },
        ),
        (wanted(2, constraints=APART), cluster(node("a", 2), node("b", 1)), {"m-0": ["a:0"], "m-1": ["b:0"]}),
        (
            [*wanted(1, constraints=SHY), *wanted(1, "n")],
            cluster(node("a", 2), node("b", 2)),
            {"m-0": ["a:0"], "n-0": ["b:0"]},
        ),
        (
            [*wanted(1, "n"), *wanted(1, constraints=SHY)],
            cluster(node("a", 2), node("b", 2)),
            {"n-0": ["a:0"], "m-0": ["b:0"]},
        ),
        (wanted(1, tensor=2, constraints=SPAN), cluster(node("a", 2)), {"m-0": ["a:0", "a:1"]}),
        (wanted(1, constraints=Constraints(tp_span=TpSpan.ANY)), cluster(node("a", 1)), {"m-0": ["a:0"]}),
        (wanted(1, constraints=SPAN), cluster(linked("a", 1, 1)), {"m-0": ["a:0"]}),
        (
            wanted(1, pipeline=2, constraints=Constraints(cross_site=True)),
            cluster(node("a", 1, site="x"), node("b", 1, site="y")),
            {"m-0": ["a:0", "b:0"]},
        ),
        (
            wanted(2, constraints=RACKS),
            cluster(node("a", 1, rack="r"), node("b", 1, rack="r"), node("c", 1, rack="s")),
            {"m-0": ["a:0"], "m-1": ["c:0"]},
        ),
    ],
)
def test_what_fits_is_found(
    requests: list[ReplicaRequest], inventory: Inventory, expected: dict[str, list[str]]
) -> None:
    assert found(requests, inventory) == expected


@pytest.mark.parametrize(
    ("requests", "inventory"),
    [
        (wanted(1), cluster()),
        (wanted(2), cluster(node("a", 1))),
        (wanted(1, tensor=2), cluster(node("a", 1), node("b", 1))),
        (wanted(3, tensor=2), cluster(node("a", 3), node("b", 3))),
        ([*wanted(1, "x", tensor=3), *wanted(1, "y", tensor=2)], cluster(node("a", 4), node("b", 1))),
        (wanted(1, tensor=2), cluster(linked("a", 1, 1))),
        (wanted(1, tensor=2, constraints=SPAN), cluster(linked("a", 2, 1))),
        (wanted(1, tensor=2, constraints=Constraints(tp_span=TpSpan.ANY)), cluster(node("a", 2))),
        (wanted(2, constraints=APART), cluster(node("a", 2))),
        (wanted(2, constraints=RACKS), cluster(node("a", 1, rack="r"), node("b", 1, rack="r"))),
        ([*wanted(1, constraints=SHY), *wanted(1, "n")], cluster(node("a", 2))),
        ([*wanted(1, "n"), *wanted(1, constraints=SHY)], cluster(node("a", 2))),
        (wanted(1, pipeline=2), cluster(node("a", 1, site="x"), node("b", 1, site="y"))),
        (wanted(1, pipeline=2), cluster(node("a", 1), node("b", 1, kind="h200"))),
        (wanted(1, device_memory_bytes=288 * GIB + 1), cluster(node("a", 1))),
        (wanted(1, constraints=Constraints(nodes=("z",))), cluster(node("a", 1))),
    ],
)
def test_what_does_not_fit_is_not_found(requests: list[ReplicaRequest], inventory: Inventory) -> None:
    assert found(requests, inventory) is None


@pytest.mark.parametrize(("groups", "is_found"), [(64, True), (65, False)])
def test_as_many_groups_as_the_bound_are_searched(groups: int, is_found: bool) -> None:
    assert (found(wanted(groups), cluster(node("a", 70))) is not None) is is_found
    assert (found(wanted(1, pipeline=groups), cluster(node("a", 70))) is not None) is is_found


@pytest.mark.parametrize(("cells", "is_found"), [(64, True), (65, False)])
def test_as_many_cells_as_the_bound_are_searched(cells: int, is_found: bool) -> None:
    nodes = [node(f"n{number:02}", 1) for number in range(cells)]
    assert (found(wanted(1), cluster(*nodes)) is not None) is is_found


def test_what_stands_already_keeps_its_devices_and_its_distance() -> None:
    stands = Placement("n-0", "n", (Rank(0, "a", 0, "mi355x"),))
    assert found(wanted(1), cluster(node("a", 2)), stands) == {"m-0": ["a:1"]}
    assert found(wanted(1, constraints=SHY), cluster(node("a", 2)), stands) is None
    assert found(wanted(1), cluster(node("a", 2)), replace(stands, avoid=("m",))) is None


def test_a_cell_with_one_device_too_small_is_left_alone() -> None:
    devices = (Device("mi355x", 0, 288 * GIB), Device("mi355x", 1, 100 * GIB))
    inventory = cluster(Node("a", "a", devices), node("b", 1))
    assert found(wanted(1, device_memory_bytes=200 * GIB), inventory) == {"m-0": ["b:0"]}
