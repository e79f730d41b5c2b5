"""Which hosts a replica goes to: the fewest, the tightest, and away from its like."""

from __future__ import annotations

from collections import Counter

import pytest

from megatoken.cluster.inventory.topology import Inventory
from megatoken.cluster.placement.place import Constraints, Separate, TpSpan
from tests.support.placements import all_placed, cluster, node, wanted


def two_sites(first: list[int], second: list[int]) -> Inventory:
    nodes = [node(f"x{at}", size, site="x") for at, size in enumerate(first)]
    return cluster(*nodes, *(node(f"y{at}", size, site="y") for at, size in enumerate(second)))


@pytest.mark.parametrize(
    ("chosen", "other", "groups"),
    [
        ([3, 3], [2, 2, 2], 6),
        ([3, 3], [4, 1, 1], 6),
        ([3, 2], [2, 2, 1], 5),
        ([5, 1, 1], [3, 3, 3], 6),
        ([5, 1], [2, 2, 2], 6),
        ([4, 4], [3, 3, 3], 7),
        ([3, 2, 2], [2, 2, 2, 2], 7),
        ([2, 2, 2, 2, 2], [3, 1, 1, 1, 1, 1], 7),
        ([4, 2, 2], [3, 3, 1, 1], 8),
        ([2, 2, 1], [1, 1, 1, 1, 1], 5),
    ],
)
@pytest.mark.parametrize("swapped", [False, True])
def test_the_site_that_needs_the_fewest_nodes_then_leaves_the_least_is_chosen(
    chosen: list[int], other: list[int], groups: int, swapped: bool
) -> None:
    inventory = two_sites(other, chosen) if swapped else two_sites(chosen, other)
    (placement,) = all_placed(wanted(1, pipeline=groups), inventory)
    assert {name[0] for name in placement.nodes} == {"y" if swapped else "x"}


@pytest.mark.parametrize(
    ("sizes", "groups", "nodes"),
    [
        ([4, 3, 2], 6, ("n0", "n2")),
        ([4, 3, 2], 7, ("n0", "n1")),
        ([4, 3, 2], 8, ("n0", "n1", "n2")),
        ([1, 4, 3, 3], 7, ("n1", "n2")),
        ([1, 4, 4, 3], 5, ("n1", "n0")),
        ([2, 4, 4], 8, ("n1", "n2")),
    ],
)
def test_the_largest_nodes_come_first_and_the_last_is_the_tightest(
    sizes: list[int], groups: int, nodes: tuple[str, ...]
) -> None:
    (placement,) = all_placed(wanted(1, pipeline=groups), cluster(*(node(f"n{i}", n) for i, n in enumerate(sizes))))
    assert placement.nodes == nodes


@pytest.mark.parametrize("level", ["site", "rack"])
def test_replicas_over_several_nodes_spread_over_sites_and_racks(level: str) -> None:
    nodes = [node(f"{zone}{at}", 1, **{level: zone}) for zone in "xy" for at in range(4)]
    placed = all_placed(wanted(4, pipeline=2), cluster(*nodes))
    assert [{name[0] for name in placement.nodes} for placement in placed] == [{"x"}, {"y"}, {"x"}, {"y"}]
    assert len({name for placement in placed for name in placement.nodes}) == 8


@pytest.mark.parametrize("models", ["mn", "mno"])
def test_each_model_spreads_by_itself(models: str) -> None:
    requests = [request for model in models for request in wanted(4, model)]
    placed = all_placed(requests, cluster(*(node(f"n{at}", 8) for at in range(4))))
    for model in models:
        assert Counter(p.driver_node for p in placed if p.model == model) == {f"n{at}": 1 for at in range(4)}


def test_racks_keep_replicas_apart_one_after_another() -> None:
    nodes = [node(f"{rack}{at}", 2, rack=rack) for rack in "rst" for at in range(2)]
    placed = all_placed(wanted(3, constraints=Constraints(separate=Separate.RACK)), cluster(*nodes))
    assert sorted(placement.driver_node[0] for placement in placed) == ["r", "s", "t"]


def test_models_that_avoid_each_other_stand_apart_in_one_call() -> None:
    requests = [*wanted(2, "m", constraints=Constraints(avoid=("n",))), *wanted(2, "n")]
    placed = all_placed(requests, cluster(*(node(f"n{at}", 4) for at in range(4))))
    assert not {p.driver_node for p in placed if p.model == "m"} & {p.driver_node for p in placed if p.model == "n"}


@pytest.mark.parametrize(("tensor", "pipeline", "data"), [(3, 1, 1), (3, 2, 1), (3, 1, 2), (2, 2, 1)])
def test_a_group_over_node_borders_is_numbered_as_any_other(tensor: int, pipeline: int, data: int) -> None:
    request = wanted(1, tensor=tensor, pipeline=pipeline, data=data, constraints=Constraints(tp_span=TpSpan.ANY))
    width = tensor * pipeline * data
    (placement,) = all_placed(request, cluster(*(node(f"n{at}", 1) for at in range(width))))
    assert [(rank.node, rank.data, rank.stage, rank.tensor) for rank in placement.ranks] == [
        (f"n{(d * pipeline + s) * tensor + t}", d, s, t)
        for d in range(data)
        for s in range(pipeline)
        for t in range(tensor)
    ]
