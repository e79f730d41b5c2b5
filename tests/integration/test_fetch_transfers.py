"""Files between FetchNodes while some of them fail. One Ray, a directory a node."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from megatoken.cluster.fetch.plan import FetchError, FileContent, Transfer
from megatoken.cluster.fetch.transfer import FetchNode, Transfers

DATA = os.urandom(3 << 20)
CONTENT = FileContent(len(DATA), hashlib.sha256(DATA).hexdigest())
NAME, SHARED, PIECE = "model.safetensors", "/models/m", 256 << 10


@pytest.fixture(scope="module")
def own_ray() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=80 << 20)
    yield
    ray.shutdown()


class Nodes:
    """Named FetchNodes, each with a directory of its own under the name that all share."""

    def __init__(self, root: Path, *names: str) -> None:
        self.path = {name: root / name / "m" for name in names}
        start: Any = FetchNode
        self.hands = {name: start.remote({SHARED: str(path)}) for name, path in self.path.items()}

    def have(self, *names: str) -> None:
        for name in names:
            self.path[name].mkdir(parents=True)
            (self.path[name] / NAME).write_bytes(DATA)

    def arrived(self, name: str) -> bool:
        place = self.path[name] / NAME
        return place.is_file() and place.read_bytes() == DATA


@pytest.fixture
def nodes(own_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    monkeypatch.setenv("MEGATOKEN_CACHE", str(tmp_path / "cache"))
    made = Nodes(tmp_path, "a", "b", "c", "d")
    yield made
    for hand in made.hands.values():
        ray.kill(hand)


def test_a_source_that_is_lost_is_exchanged_and_nothing_is_written_twice(nodes: Nodes) -> None:
    nodes.have("a", "b")
    written: list[int] = []

    def report(size: int) -> None:
        written.append(size)
        if len(written) == 3:
            ray.kill(nodes.hands["a"])

    moving = Transfers(SHARED, nodes.hands, PIECE, report)
    moving.run(Transfer(NAME, CONTENT, ("a", "b"), {"c": 0, "d": 0}))
    assert nodes.arrived("c")
    assert nodes.arrived("d")
    assert sum(written) == 2 * CONTENT.size
    assert list(moving.problems) == ["a"]


def test_a_node_whose_disk_fails_is_named_and_the_others_go_on(nodes: Nodes) -> None:
    nodes.have("a")
    nodes.path["b"].parent.mkdir()
    nodes.path["b"].write_text("a file where the directory should be")
    moving = Transfers(SHARED, nodes.hands, PIECE, lambda _size: None)
    moving.run(Transfer(NAME, CONTENT, ("a",), {"b": 0, "c": 0}))
    assert nodes.arrived("c")
    assert list(moving.problems) == ["b"]
    assert "exists" in moving.problems["b"] or "Not a directory" in moving.problems["b"]
    moving.run(Transfer("other.json", FileContent(0, hashlib.sha256().hexdigest()), ("c",), {"b": 0}))
    assert list(moving.problems) == ["b"], "it is left out from then on"


def test_a_source_whose_file_shrank_is_to_blame_and_without_another_the_fetch_ends(nodes: Nodes) -> None:
    nodes.have("a")
    with (nodes.path["a"] / NAME).open("r+b") as file:
        file.truncate(PIECE)
    moving = Transfers(SHARED, nodes.hands, PIECE, lambda _size: None)
    (nodes.path["b"]).mkdir(parents=True)
    with pytest.raises(FetchError, match=f"{SHARED}/{NAME}: no node is left to take it from"):
        moving.run(Transfer(NAME, CONTENT, ("a",), {"b": 0}))
    assert not nodes.arrived("b")
