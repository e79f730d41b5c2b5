"""The reduced vector: what every rank adds, and that a disagreement shows."""

from __future__ import annotations

import json

import numpy as np
import pytest

from megatoken.counters import INDEX
from megatoken.worker.throughput.decide.layout import (
    WIRE_VERSION,
    Cell,
    Greeting,
    Layout,
    LayoutError,
    ReplicaFacts,
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
    with pytest.raises(LayoutError, match="agent-3 on node node-3 speaks version 2"):
        Greeting.unpack(json.dumps(other).encode())
    for garbage in (b"", b"{}", b"\xff", b'{"wire_version": 1, "models": 3}'):
        with pytest.raises(LayoutError, match="parse"):
            Greeting.unpack(garbage)


def test_departed_cells_survive_the_wire() -> None:
    cells = [(Cell("l", "model", "m", "n", "s"), tuple(range(WIDTH)))]
    assert unpack_departed(pack_departed(cells)) == cells
    with pytest.raises(LayoutError):
        unpack_departed(b"[[1]]")
