"""The reduced vector: what every rank adds, and that a disagreement shows."""

from __future__ import annotations

import json

import numpy as np
import pytest

from megatoken.counters import INDEX
from megatoken.worker.throughput.decide.layout import (
    MAX_DEPARTED,
    WIRE_VERSION,
    Cell,
    Greeting,
    Layout,
    LayoutError,
    ReplicaFacts,
    greeting_of,
    pack_departed,
    unpack_departed,
)
from megatoken.worker.throughput.decide.ledger import WIDTH, NodeSums, Writer

TOKENS = INDEX["generated_tokens"]
FACTS = ReplicaFacts("m", "vllm", "cpu", 1, True)


def greeting(rank: int, replicas: tuple[str, ...] = ("r",)) -> Greeting:
    named = tuple((f"{name}{rank}", FACTS) for name in replicas)
    return Greeting(f"agent-{rank}", f"node-{rank}", "", f"ledger-{rank}", ("m",), named)


def sums(rank: int, tokens: int) -> NodeSums:
    counted = np.full(WIDTH, tokens, np.int64)
    routers = np.full(WIDTH, 1000 + rank, np.int64)
    return NodeSums(routers, {"m": counted}, {f"r{rank}": (Writer("worker", f"r{rank}", 1, "m"), counted)})


def test_one_sum_gives_the_totals_and_every_row() -> None:
    layout = Layout.of([greeting(0), greeting(1), greeting(2)])
    vector = sum(layout.encode(rank, sums(rank, 10**rank), rank == 1) for rank in range(3))
    cells, news = layout.decode(vector)
    assert news == 1
    named = {(cell.ledger, cell.kind, cell.name): cells[place] for place, cell in enumerate(layout.cells)}
    assert named["ledger-2", "model", "m"][TOKENS] == 100
    assert named["ledger-1", "replica", "r1"][TOKENS] == 10
    assert named["ledger-0", "routers", ""][TOKENS] == 1000


def test_what_came_after_the_greeting_is_not_in_the_vector_and_does_not_unbalance_it() -> None:
    layout = Layout.of([greeting(0)])
    more = sums(0, 5)
    more.models["new"] = np.full(WIDTH, 7, np.int64)
    cells, news = layout.decode(layout.encode(0, more, True))
    assert news == 1
    assert int(cells[:, TOKENS].sum()) == 1000 + 5 + 5


def test_ranks_with_different_layouts_are_found_out() -> None:
    here, there = Layout.of([greeting(0), greeting(1)]), Layout.of([greeting(0), greeting(1, ("x",))])
    with pytest.raises(LayoutError, match="do not agree"):
        here.decode(here.encode(0, sums(0, 1), False) + there.encode(1, sums(1, 1), False))


def test_a_missing_rank_is_found_out() -> None:
    layout = Layout.of([greeting(0), greeting(1)])
    with pytest.raises(LayoutError, match="1 of 2 ranks"):
        layout.decode(layout.encode(0, sums(0, 1), False))


def test_a_row_that_does_not_fit_the_total_is_found_out() -> None:
    layout = Layout.of([greeting(0)])
    vector = layout.encode(0, sums(0, 1), False)
    vector[-2 * WIDTH] += 1  # a cell of the model
    with pytest.raises(LayoutError, match="workers' rows"):
        layout.decode(vector)


def test_greetings_survive_the_wire_and_other_versions_are_named() -> None:
    packed = greeting(3).pack()
    assert Greeting.unpack(packed) == greeting(3)
    other = {**json.loads(packed), "wire_version": WIRE_VERSION + 1, "something": "new"}
    with pytest.raises(LayoutError, match=f"agent-3 on node node-3 speaks version {WIRE_VERSION + 1}"):
        Greeting.unpack(json.dumps(other).encode())
    for garbage in (b"", b"{}", b"\xff", f'{{"wire_version": {WIRE_VERSION}, "models": 3}}'.encode()):
        with pytest.raises(LayoutError, match="parse"):
            Greeting.unpack(garbage)


def test_departed_cells_survive_the_wire() -> None:
    cells = [(Cell("l", "model", "m", "n", "s"), tuple(range(WIDTH)))]
    assert unpack_departed(pack_departed(cells)) == cells
    with pytest.raises(LayoutError):
        unpack_departed(b"[[1]]")


def test_the_vector_is_a_head_then_the_cells_of_each_rank() -> None:
    layout = Layout.of([greeting(0), greeting(1, ("r", "x"))])
    assert layout.starts == [0, 3]
    assert layout.length == 3 + 2 * WIDTH + 7 * WIDTH
    vector = layout.encode(1, sums(1, 5), True)
    head, cells = vector[: 3 + 2 * WIDTH].tolist(), vector[3 + 2 * WIDTH :].reshape(-1, WIDTH)
    assert head == [1, layout.digest, 1, *[5] * WIDTH, *[1001] * WIDTH]
    assert [set(cell.tolist()) for cell in cells] == [{0}, {0}, {0}, {1001}, {5}, {5}, {0}]
    assert layout.encode(1, sums(1, 5), False)[2] == 0


def test_a_model_or_replica_that_the_node_lost_sight_of_is_zero_and_the_next_keep_their_places() -> None:
    base = Greeting("a", "n", "", "l", ("gone", "m"), (("gone", FACTS), ("r0", FACTS)))
    cells, news = (layout := Layout.of([base])).decode(layout.encode(0, sums(0, 5), False))
    assert [int(cell[TOKENS]) for cell in cells] == [1000, 0, 5, 0, 5]
    assert news == 0


def test_every_model_of_a_rank_is_in_the_workers_total() -> None:
    layout = Layout.of([Greeting("a", "n", "", "l", ("m", "o"))])
    both = sums(0, 5)
    both.models["o"] = np.full(WIDTH, 7, np.int64)
    assert layout.encode(0, both, False)[3] == 12


@pytest.mark.parametrize("change", ["ledger", "kind", "name"])
def test_the_digest_tells_layouts_apart_that_have_the_same_length(change: str) -> None:
    first = Greeting("a", "n", "", "l", ("m", "o"), ())
    others = {
        "ledger": Greeting("a", "n", "", "l2", ("m", "o"), ()),
        "kind": Greeting("a", "n", "", "l", ("m",), (("o", FACTS),)),
        "name": Greeting("a", "n", "", "l", ("m", "p"), ()),
    }
    here, there = Layout.of([first]), Layout.of([others[change]])
    assert here.length == there.length
    assert here.digest != there.digest
    assert 0 <= here.digest < 2**32
    assert here.digest == Layout.of([Greeting("b", "n2", "s", "l", ("m", "o"), ())]).digest


@pytest.mark.parametrize(("place", "by"), [(0, 1), (1, 1), (0, -1), (1, -1)])
def test_a_rank_count_or_digest_that_is_off_by_one_is_found_out(place: int, by: int) -> None:
    layout = Layout.of([greeting(0)])
    vector = layout.encode(0, sums(0, 1), False)
    vector[place] += by
    with pytest.raises(LayoutError, match="do not agree"):
        layout.decode(vector)


def test_a_vector_of_another_length_is_found_out() -> None:
    layout = Layout.of([greeting(0)])
    vector = np.append(layout.encode(0, sums(0, 1), False), np.zeros(WIDTH, np.int64))
    with pytest.raises(LayoutError, match=f"1 of 1 ranks, {layout.length + WIDTH} of {layout.length} values, digest"):
        layout.decode(vector)


@pytest.mark.parametrize(
    ("place", "said"), [(3, "workers"), (2 + WIDTH, "workers"), (3 + WIDTH, "routers"), (2 + 2 * WIDTH, "routers")]
)
def test_each_total_must_fit_its_rows_in_every_column(place: int, said: str) -> None:
    layout = Layout.of([greeting(0)])
    vector = layout.encode(0, sums(0, 1), False)
    vector[place] += 1
    with pytest.raises(LayoutError, match=f"the sum of the {said}' rows differs"):
        layout.decode(vector)


@pytest.mark.parametrize(("serving", "served"), [(None, True), (frozenset({"r0"}), True), (frozenset({"x"}), False)])
def test_a_greeting_says_what_the_node_has_now(serving: frozenset[str] | None, served: bool) -> None:
    writer = Writer("worker", "r0", 3, "m", "vllm", "MI355X", 4)
    counted = np.zeros(WIDTH, np.int64)
    now = NodeSums(counted, {"m": counted, "o": counted}, {"r0": (writer, counted)})
    made = greeting_of(Greeting("a", "n", "s", "l", ("old",)), now, serving)
    assert made == Greeting("a", "n", "s", "l", ("m", "o"), (("r0", ReplicaFacts("m", "vllm", "MI355X", 4, served)),))


def test_departed_cells_are_told_up_to_their_bound() -> None:
    cell: tuple[Cell, tuple[int, ...]] = (Cell("l", "routers", "", "n", ""), (1,))
    assert len(unpack_departed(pack_departed([cell] * MAX_DEPARTED))) == MAX_DEPARTED
    assert len(unpack_departed(pack_departed([cell] * (MAX_DEPARTED + 1)))) == MAX_DEPARTED
