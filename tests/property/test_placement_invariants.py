"""Named invariants of placement over generated clusters."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from megatoken.cluster.inventory.topology import Device, Inventory, Node
from megatoken.cluster.placement.place import Blocked, Constraints, Placement, ReplicaRequest, Separate, TpSpan, place

KINDS = ("mi300x", "mi355x")
SITES = ("", "paris")


@st.composite
def nodes(draw: st.DrawFn, name: str) -> Node:
    kind = draw(st.sampled_from(KINDS))
    count = draw(st.sampled_from((0, 1, 2, 3, 4, 5, 8)))
    split = draw(st.booleans())
    return Node(
        id=name,
        address=name,
        site=draw(st.sampled_from(SITES)),
        rack=draw(st.sampled_from(("", "r1", "r2"))),
        alive=draw(st.integers(0, 9)) > 0,
        draining=draw(st.integers(0, 9)) == 0,
        devices=tuple(
            Device(
                kind,
                index,
                draw(st.sampled_from((0, 192, 288))),
                link_domain=str(index // 4) if split else "",
                out=draw(st.sampled_from(("", "", "", "driver error"))),
            )
            for index in range(count)
        ),
    )


@st.composite
def inventories(draw: st.DrawFn) -> Inventory:
    count = draw(st.integers(1, 6))
    return Inventory(tuple(draw(nodes(f"n{number}")) for number in range(count)))


@st.composite
def constraints(draw: st.DrawFn, spans: tuple[TpSpan, ...]) -> Constraints:
    return Constraints(
        device_kinds=draw(st.sampled_from(((), (), ("mi355x",), KINDS))),
        sites=draw(st.sampled_from(((), (), ("paris",)))),
        separate=draw(st.sampled_from((Separate.NONE, Separate.NONE, Separate.NODE, Separate.RACK))),
        avoid=draw(st.sampled_from(((), (), ("m0",)))),
        tp_span=draw(st.sampled_from(spans)),
        cross_site=draw(st.booleans()),
    )


@st.composite
def specs(draw: st.DrawFn, spans: tuple[TpSpan, ...] = tuple(TpSpan)) -> list[ReplicaRequest]:
    requests = []
    for model in range(draw(st.integers(1, 3))):
        shape = ReplicaRequest(
            "",
            f"m{model}",
            tensor=draw(st.sampled_from((1, 2, 3, 4, 5, 8))),
            pipeline=draw(st.sampled_from((1, 1, 2, 3))),
            data=draw(st.sampled_from((1, 1, 2))),
            device_memory_bytes=draw(st.sampled_from((0, 200))),
            constraints=draw(constraints(spans)),
        )
        for copy in range(draw(st.integers(1, 4))):
            fields = {name: getattr(shape, name) for name in ("tensor", "pipeline", "data", "device_memory_bytes")}
            requests.append(
                ReplicaRequest(f"{shape.model}-{copy}", shape.model, constraints=shape.constraints, **fields)
            )
    return requests


def placed(outcomes: tuple[Placement | Blocked, ...]) -> list[Placement]:
    return [outcome for outcome in outcomes if isinstance(outcome, Placement)]


@settings(deadline=None)
@given(specs(), inventories())
def test_a_device_holds_at_most_one_rank_and_only_a_serving_one(
    requests: list[ReplicaRequest], inventory: Inventory
) -> None:
    used = Counter(
        (rank.node, rank.device) for placement in placed(place(requests, inventory)) for rank in placement.ranks
    )
    assert all(count == 1 for count in used.values())
    for node_id, index in used:
        node = inventory.node(node_id)
        assert node is not None
        assert node.alive
        assert not node.draining
        device = node.device(index)
        assert device is not None
        assert device.healthy


@settings(deadline=None)
@given(specs(), inventories())
def test_every_rank_is_placed_once_and_contiguous_by_node(requests: list[ReplicaRequest], inventory: Inventory) -> None:
    by_replica = {request.replica: request for request in requests}
    for placement in placed(place(requests, inventory)):
        request = by_replica[placement.replica]
        assert [rank.rank for rank in placement.ranks] == list(range(request.width))
        numbered = [
            (rank.data * request.pipeline + rank.stage) * request.tensor + rank.tensor for rank in placement.ranks
        ]
        assert numbered == list(range(request.width))
        changes = sum(a.node != b.node for a, b in zip(placement.ranks, placement.ranks[1:], strict=False))
        assert changes == len(placement.nodes) - 1
        assert list(placement.nodes[1:]) == sorted(placement.nodes[1:]), "vLLM sorts all but the driver's node by id"


@settings(deadline=None)
@given(specs((TpSpan.LINK, TpSpan.NODE)), inventories())
def test_no_tp_group_is_split(requests: list[ReplicaRequest], inventory: Inventory) -> None:
    spans = {request.replica: request.constraints.tp_span for request in requests}
    for placement in placed(place(requests, inventory)):
        groups: dict[tuple[int, int], set[tuple[str, str]]] = {}
        for rank in placement.ranks:
            device = inventory.node(rank.node).device(rank.device)  # type: ignore[union-attr]
            domain = device.link_domain if spans[placement.replica] is TpSpan.LINK else ""  # type: ignore[union-attr]
            groups.setdefault((rank.data, rank.stage), set()).add((rank.node, domain))
        assert all(len(places) == 1 for places in groups.values())


@settings(deadline=None)
@given(specs(), inventories())
def test_constraints_hold(requests: list[ReplicaRequest], inventory: Inventory) -> None:
    by_replica = {request.replica: request for request in requests}
    outcomes = placed(place(requests, inventory))
    on_node: dict[str, Counter[str]] = {}
    in_domain: dict[str, Counter[str]] = {}
    for placement in outcomes:
        request, rules = by_replica[placement.replica], by_replica[placement.replica].constraints
        homes = [inventory.node(node_id) for node_id in placement.nodes]
        assert len({rank.kind for rank in placement.ranks}) == 1
        assert not rules.device_kinds or placement.ranks[0].kind in rules.device_kinds
        assert rules.cross_site or len({home.site for home in homes if home}) == 1
        for home in homes:
            assert home is not None
            assert not rules.sites or home.site in rules.sites
            on_node.setdefault(home.id, Counter())[placement.model] += 1
        for domain in {home.failure_domain for home in homes if home}:
            in_domain.setdefault(domain, Counter())[placement.model] += 1
        for rank in placement.ranks:
            memory = inventory.node(rank.node).device(rank.device).memory_bytes  # type: ignore[union-attr]
            assert not memory or memory >= request.device_memory_bytes
    for request in requests:
        rules = request.constraints
        for here in on_node.values():
            assert rules.separate is not Separate.NODE or here[request.model] <= 1
            for other in rules.avoid:
                assert other == request.model or not (here[request.model] and here[other])
        for here in in_domain.values():
            assert rules.separate is not Separate.RACK or here[request.model] <= 1


@settings(deadline=None)
@given(specs(), inventories(), st.randoms(use_true_random=False))
def test_the_same_inputs_in_any_node_order_give_the_same_answer(
    requests: list[ReplicaRequest], inventory: Inventory, random: object
) -> None:
    shuffled = list(inventory.nodes)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert placed(place(requests, inventory)) == placed(place(requests, Inventory(tuple(shuffled))))


@settings(max_examples=120, deadline=None)
@given(specs((TpSpan.LINK,)), inventories(), nodes("n9"), st.integers(0, 6))
def test_adding_a_node_never_makes_a_placeable_spec_unplaceable(
    requests: list[ReplicaRequest], inventory: Inventory, added: Node, position: int
) -> None:
    if any(isinstance(outcome, Blocked) for outcome in place(requests, inventory)):
        return
    named = Node(
        id=f"n{position}-",  # between the others: its place in the order must not matter
        address="added",
        devices=added.devices,
        site=added.site,
        rack=added.rack,
    )
    outcomes = place(requests, Inventory((*inventory.nodes, named)))
    assert not [outcome for outcome in outcomes if isinstance(outcome, Blocked)]


@settings(deadline=None)
@given(specs(), inventories(), st.data())
def test_removing_a_replica_moves_no_other(
    requests: list[ReplicaRequest], inventory: Inventory, data: st.DataObject
) -> None:
    standing = placed(place(requests, inventory))
    if not standing:
        return
    gone = data.draw(st.sampled_from(standing))
    left = [placement for placement in standing if placement is not gone]
    again = next(request for request in requests if request.replica == gone.replica)
    (outcome,) = place([again], inventory, left)
    assert isinstance(outcome, Placement), "its own place is free"
    taken = {(rank.node, rank.device) for placement in left for rank in placement.ranks}
    assert not taken & {(rank.node, rank.device) for rank in outcome.ranks}


@settings(deadline=None)
@given(specs(), inventories())
def test_placing_in_two_calls_never_overlaps(requests: list[ReplicaRequest], inventory: Inventory) -> None:
    half = len(requests) // 2
    first = placed(place(requests[:half], inventory))
    second = placed(place(requests[half:], inventory, first))
    used = Counter((rank.node, rank.device) for placement in [*first, *second] for rank in placement.ranks)
    assert all(count == 1 for count in used.values())


@settings(deadline=None)
@given(specs(), inventories())
def test_a_blocked_replica_says_why_and_what_helps(requests: list[ReplicaRequest], inventory: Inventory) -> None:
    for outcome in place(requests, inventory):
        if isinstance(outcome, Blocked):
            assert outcome.reason.endswith(".")
            assert outcome.unblock.endswith(".")
