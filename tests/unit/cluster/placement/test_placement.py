"""Placement by example: what goes where, and what is said when nothing fits."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from megatoken.cluster.inventory.topology import Device, Inventory, Node
from megatoken.cluster.placement.place import (
    Blocked,
    BlockedKind,
    Constraints,
    Placement,
    ReplicaRequest,
    Separate,
    TpSpan,
    place,
)
from tests.support.placements import GIB, all_placed, cluster, node, only_blocked, wanted


def test_eighty_seven_of_eighty_eight_devices_serve() -> None:
    nodes = [node(f"n{number:02}", out=(3,) if number == 5 else ()) for number in range(11)]
    outcomes = place(wanted(88), cluster(*nodes))
    placed = [outcome for outcome in outcomes if isinstance(outcome, Placement)]
    assert len(placed) == 87
    (blocked,) = [outcome for outcome in outcomes if isinstance(outcome, Blocked)]
    assert "n05 device 3 (driver error)" in blocked.reason
    assert "bring back the devices that are left out" in blocked.unblock


def test_tp_groups_are_packed_around_a_hole() -> None:
    (placement,) = all_placed(wanted(1, tensor=4), cluster(node("a", out=(1, 2))))
    assert [rank.device for rank in placement.ranks] == [0, 3, 4, 5]


def test_a_tp_group_stays_inside_a_link_domain() -> None:
    devices = tuple(Device("mi355x", i, link_domain=str(i // 4), out="bad" if i == 0 else "") for i in range(8))
    inventory = cluster(Node("a", "a", devices))
    (first,) = all_placed(wanted(1, tensor=4), inventory)
    assert [rank.device for rank in first.ranks] == [4, 5, 6, 7]
    assert "only 3 devices stand free" in only_blocked(wanted(2, tensor=4), inventory).reason
    spanning = Constraints(tp_span=TpSpan.NODE)
    (wide,) = all_placed(wanted(1, tensor=7, constraints=spanning), inventory)
    assert [rank.device for rank in wide.ranks] == [1, 2, 3, 4, 5, 6, 7]


def test_stages_go_to_as_few_nodes_as_hold_them_with_the_drivers_first() -> None:
    inventory = cluster(node("a", 2), node("b", 4), node("c", 6), node("d", 3))
    (placement,) = all_placed(wanted(1, tensor=2, pipeline=5), inventory)
    assert placement.nodes == ("c", "b")
    assert placement.driver_node == "c"
    assert [rank.stage for rank in placement.ranks] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert [rank.node for rank in placement.ranks] == ["c"] * 6 + ["b"] * 4
    assert placement.bundle_indices == "0,1,2,3,4,5,6,7,8,9"


def test_nodes_after_the_drivers_come_in_id_order_as_vllm_sorts_them() -> None:
    inventory = cluster(node("a", 1), node("b", 2), node("c", 4), node("d", 4))
    (placement,) = all_placed(wanted(1, pipeline=11), inventory)
    assert placement.nodes == ("c", "a", "b", "d")


def test_a_replica_prefers_one_rack_and_never_leaves_its_site_unasked() -> None:
    nodes = [node(f"n{i}", 2, site="east" if i < 3 else "west", rack=f"r{i % 2}") for i in range(6)]
    (placement,) = all_placed(wanted(1, tensor=2, pipeline=2), cluster(*nodes))
    assert len({(node.site, node.rack) for node in nodes if node.id in placement.nodes}) == 1
    assert "not in one site" in only_blocked(wanted(1, tensor=2, pipeline=4), cluster(*nodes)).reason
    (wide,) = all_placed(wanted(1, tensor=2, pipeline=4, constraints=Constraints(cross_site=True)), cluster(*nodes))
    assert len(wide.nodes) == 4


def test_replicas_spread_over_sites_then_racks_then_nodes() -> None:
    nodes = [node(f"n{i}", site="east" if i < 4 else "west", rack=f"r{i // 2}") for i in range(8)]
    placed = all_placed(wanted(8), cluster(*nodes))
    assert Counter(placement.driver_node for placement in placed) == {f"n{i}": 1 for i in range(8)}
    assert {nodes[int(p.driver_node[1])].site for p in placed[:2]} == {"east", "west"}
    assert len({nodes[int(p.driver_node[1])].rack for p in placed[:4]}) == 4


def test_among_equals_the_tightest_fit_leaves_the_largest_gap() -> None:
    inventory = cluster(node("large", 8), node("small", 2))
    (placement,) = all_placed(wanted(1, tensor=2), inventory)
    assert placement.driver_node == "small"


def test_wide_replicas_choose_first() -> None:
    requests = [*wanted(8, "narrow"), *wanted(1, "wide", tensor=8)]
    placed = all_placed(requests, cluster(node("a"), node("b")))
    assert [placement.replica for placement in placed] == [request.replica for request in requests]
    assert len({rank.node for rank in placed[-1].ranks}) == 1


def test_awkward_sizes_that_greedy_choice_would_strand_are_found() -> None:
    # 5 goes tightest into the 5; then 4 + 4 fill the 8 and 3 the other 3; a first choice of 5 in the 8 strands a 4.
    inventory = cluster(node("a", 8), node("b", 5), node("c", 3))
    requests = [*wanted(1, "x", tensor=5), *wanted(2, "y", tensor=4), *wanted(1, "z", tensor=3)]
    assert len(all_placed(requests, inventory)) == 4


def test_where_not_everything_fits_every_model_gets_its_first_replica() -> None:
    requests = [*wanted(2, "wide", tensor=8), *wanted(4, "narrow")]
    outcomes = place(requests, cluster(node("a"), node("b", 4)))
    placed = Counter(outcome.model for outcome in outcomes if isinstance(outcome, Placement))
    assert placed == {"wide": 1, "narrow": 4}


def test_existing_placements_keep_their_devices() -> None:
    inventory = cluster(node("a", 4))
    (first,) = all_placed(wanted(1, tensor=2), inventory)
    (second,) = all_placed(wanted(1, "n", tensor=2), inventory, first)
    assert [rank.device for rank in second.ranks] == [2, 3]


@pytest.mark.parametrize("state", [{"alive": False}, {"draining": True}])
def test_dead_and_draining_nodes_take_nothing_new(state: dict[str, bool]) -> None:
    blocked = only_blocked(wanted(1), cluster(node("a", **state)))
    assert "a" in blocked.reason.split(": ")[-1]
    assert ("bring back the dead nodes" in blocked.unblock) or ("end the drain" in blocked.unblock)


@pytest.mark.parametrize(
    ("constraints", "said"),
    [
        (Constraints(device_kinds=("h200",)), "no node has devices of kind h200 (there is: mi355x)"),
        (Constraints(sites=("mars",)), "no node has site mars (there is: east)"),
        (Constraints(nodes=("zz",)), "no node has name zz (there is: a)"),
        (Constraints(labels=(("tier", "gold"),)), "no node has label tier=gold (there is: tier=tin)"),
    ],
)
def test_a_constraint_that_nothing_meets_is_named_with_what_there_is(constraints: Constraints, said: str) -> None:
    inventory = cluster(node("a", site="east", labels={"tier": "tin"}))
    assert said in only_blocked(wanted(1, constraints=constraints), inventory).reason


def test_constraints_pick_the_node() -> None:
    inventory = cluster(node("a", site="east"), node("b", site="west", labels={"tier": "gold"}), node("c", kind="h200"))
    for constraints, expected in (
        (Constraints(sites=("west",)), "b"),
        (Constraints(labels=(("tier", "gold"),)), "b"),
        (Constraints(device_kinds=("h200",)), "c"),
        (Constraints(nodes=("a",)), "a"),
    ):
        (placement,) = all_placed(wanted(1, constraints=constraints), inventory)
        assert placement.driver_node == expected


def test_separate_and_avoid_hold_both_ways() -> None:
    apart = Constraints(separate=Separate.NODE)
    placed = all_placed(wanted(2, constraints=apart), cluster(node("a"), node("b")))
    assert len({placement.driver_node for placement in placed}) == 2
    blocked = only_blocked(wanted(3, constraints=apart), cluster(node("a"), node("b")))
    assert "stand apart by anti-affinity" in blocked.reason

    (shy,) = all_placed(wanted(1, "shy", constraints=Constraints(avoid=("loud",))), cluster(node("a"), node("b")))
    (loud,) = all_placed(wanted(1, "loud"), cluster(node("a"), node("b")), shy)
    assert loud.driver_node != shy.driver_node


def test_memory_that_no_device_has_is_said_before_anything_starts() -> None:
    blocked = only_blocked(wanted(1, device_memory_bytes=400 * GIB), cluster(node("a")))
    assert "needs 1 device with 400.0 GiB on each" in blocked.reason.lower().replace("gib", "GiB")
    assert "the largest allowed device has 288.0 GiB" in blocked.reason


def test_a_tp_group_wider_than_any_node_is_blocked_unless_it_may_span_nodes() -> None:
    inventory = cluster(node("a", 4), node("b", 4))
    blocked = only_blocked(wanted(1, tensor=8), inventory)
    assert "no link domain has more than 4 devices" in blocked.reason
    assert "Lower the tensor size to 4 or less" in blocked.unblock
    (placement,) = all_placed(wanted(1, tensor=8, constraints=Constraints(tp_span=TpSpan.ANY)), inventory)
    assert [rank.node for rank in placement.ranks] == ["a"] * 4 + ["b"] * 4
    assert [rank.tensor for rank in placement.ranks] == list(range(8))


def test_data_parallel_copies_are_numbered_outermost() -> None:
    (placement,) = all_placed(wanted(1, tensor=2, pipeline=2, data=2), cluster(node("a", 4), node("b", 4)))
    assert [(rank.data, rank.stage, rank.tensor) for rank in placement.ranks] == [
        (data, stage, tensor) for data in (0, 1) for stage in (0, 1) for tensor in (0, 1)
    ]
    assert {rank.node for rank in placement.ranks if rank.data == 0} == {placement.driver_node}


def test_a_replica_never_mixes_device_kinds() -> None:
    inventory = cluster(node("a", 2), node("b", 2, kind="h200"))
    assert "of one kind" in only_blocked(wanted(1, tensor=2, pipeline=2), inventory).reason


def test_an_empty_cluster_says_so() -> None:
    assert only_blocked(wanted(1), cluster()).unblock == "Add a node."


def test_twice_the_same_replica_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="m-0 appears twice"):
        place([*wanted(1), *wanted(1)], cluster(node("a")))


@pytest.mark.parametrize(
    ("requests", "inventory", "kind"),
    [
        (wanted(9), cluster(node("a")), BlockedKind.CAPACITY),
        (wanted(1), cluster(), BlockedKind.CAPACITY),
        (wanted(1, tensor=16), cluster(node("a"), node("b")), BlockedKind.TOPOLOGY),
        (
            wanted(1, tensor=4),
            cluster(node("a", out=(2, 3, 4, 5, 6)), node("b", out=(0, 1, 2, 3, 4))),
            BlockedKind.TOPOLOGY,
        ),
        (wanted(1, device_memory_bytes=400 * GIB), cluster(node("a")), BlockedKind.MEMORY),
        (wanted(1, constraints=Constraints(sites=("mars",))), cluster(node("a", site="east")), BlockedKind.CONSTRAINT),
        (wanted(2, constraints=Constraints(separate=Separate.NODE)), cluster(node("a")), BlockedKind.CONSTRAINT),
    ],
)
def test_what_blocks_a_replica_is_data_beside_the_sentence(
    requests: list[ReplicaRequest], inventory: Inventory, kind: BlockedKind
) -> None:
    assert only_blocked(requests, inventory).kind is kind


def test_where_not_everything_fits_a_model_that_runs_already_comes_after_one_that_does_not() -> None:
    inventory = cluster(node("a", 2))
    (runs,) = all_placed(wanted(1, "m"), inventory)
    more = [replace(wanted(1, "m")[0], replica="m-1"), *wanted(1, "n")]
    outcomes = place(more, inventory, [runs])
    assert [type(outcome) for outcome in outcomes] == [Blocked, Placement]


@pytest.mark.parametrize("wide", [{"tensor": 4}, {"pipeline": 4}, {"tensor": 2, "pipeline": 2}])
def test_where_not_everything_fits_the_widest_first_replica_comes_first(wide: dict[str, int]) -> None:
    outcomes = place([*wanted(1, "narrow"), *wanted(1, "wide", **wide)], cluster(node("a", 4)))
    assert [type(outcome) for outcome in outcomes] == [Blocked, Placement]


def test_what_is_placed_beside_something_blocked_still_spreads() -> None:
    outcomes = place([*wanted(1, "wide", tensor=9), *wanted(2, "n")], cluster(node("a", 4), node("b", 4)))
    assert {outcome.driver_node for outcome in outcomes if isinstance(outcome, Placement)} == {"a", "b"}


@pytest.mark.parametrize("sizes", [{"tensor": 0}, {"pipeline": 0}, {"data": 0}])
def test_a_size_below_one_is_a_mistake_of_the_caller(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="replica m-0: parallel sizes must be at least 1"):
        place([ReplicaRequest("m-0", "m", **sizes)], cluster(node("a")))
