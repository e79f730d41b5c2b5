"""Placements for people."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatoken.cluster.placement.place import Rank
from megatoken.cluster.placement.text import rank_text
from tests.support.placements import cluster, node


@pytest.mark.parametrize(("known", "title"), [("a", "node-a"), ("b", "b"), ("gone", "gone")])
def test_a_rank_names_its_node_by_its_title_where_it_is_known(known: str, title: str) -> None:
    inventory = cluster(replace(node("a"), name="node-a"), node("b"))
    assert rank_text(Rank(3, known, 5, "mi355x"), inventory) == f"rank 3: {title} device 5"
