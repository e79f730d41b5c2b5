"""Which files go where, and when nothing may be copied."""

from __future__ import annotations

from typing import Any

import pytest

from megatoken.cluster.fetch.plan import (
    FetchError,
    FileContent,
    Holding,
    fetched_source,
    further_files,
    part_name,
    plan,
)
from megatoken.cluster.spec.model import ModelSpec

SMALL, LARGE, OTHER = FileContent(10, "a" * 64), FileContent(1000, "b" * 64), FileContent(1000, "c" * 64)
GIB = 1 << 30


def holding(name: str, free: int = GIB, *, receives: bool = True, **files: FileContent) -> Holding:
    return Holding(f"id-{name}", name, receives, files, {}, free)


@pytest.mark.parametrize(
    ("fields", "source"),
    [
        ({"source": "/data/m@2"}, "/data/m@2"),
        ({"source": "builtin:tiny-llama"}, ""),
        ({"engine": "simulated"}, ""),
        ({"source": "org/m"}, "models--org--m@main"),
        ({"source": "gpt2", "engine_args": {"revision": "v1"}}, "models--gpt2@v1"),
        ({"source": "org/m", "env": {"HF_HOME": "/hf"}}, "/hf/hub/models--org--m@main"),
        ({"source": "org/m", "env": {"HF_HOME": "/hf", "HF_HUB_CACHE": "/c"}}, "/c/models--org--m@main"),
        (
            {"source": "org/m", "env": {"HF_HUB_CACHE": "/c"}, "engine_args": {"download_dir": "/d"}},
            "/d/models--org--m@main",
        ),
    ],
)
def test_what_is_fetched_for_a_model(fields: dict[str, Any], source: str) -> None:
    assert fetched_source(ModelSpec(name="m", **fields)) == source


def test_each_file_goes_from_all_that_have_it_to_those_that_lack_it_small_ones_first() -> None:
    found = plan("/m", [holding("a", small=SMALL, large=LARGE), holding("b", large=LARGE), holding("c")])
    assert found.files == {"small": SMALL, "large": LARGE}
    assert [(one.name, one.sources, dict(one.targets), one.missing) for one in found.transfers] == [
        ("small", ("id-a",), {"id-b": 0, "id-c": 0}, 20),
        ("large", ("id-a", "id-b"), {"id-c": 0}, 1000),
    ]


def test_where_all_have_the_same_nothing_is_copied() -> None:
    assert plan("/m", [holding("a", free=0, x=LARGE), holding("b", free=0, x=LARGE)]).transfers == []


def test_a_node_without_devices_gives_and_does_not_receive() -> None:
    found = plan("/m", [holding("head", receives=False, x=LARGE), holding("a"), holding("store", receives=False)])
    assert [dict(one.targets) for one in found.transfers] == [{"id-a": 0}]


def test_what_arrived_before_counts_if_it_is_of_the_same_content() -> None:
    part = part_name("sub/x", LARGE)
    assert part == "sub/.x.bbbbbbbbbbbbbbbb.part"
    whole = holding("a", **{"sub/x": LARGE})
    begun = Holding("id-b", "b", True, {}, {part: 400}, 600)
    stale = Holding("id-c", "c", True, {}, {part_name("sub/x", OTHER): 400}, 1000)
    (transfer,) = plan("/m", [whole, begun, stale]).transfers
    assert dict(transfer.targets) == {"id-b": 400, "id-c": 0}


def test_nodes_that_differ_need_a_person_to_say_whose_files_are_right() -> None:
    nodes = [holding("a", x=LARGE), holding("b", x=OTHER)]
    with pytest.raises(FetchError) as caught:
        plan("/m", nodes)
    assert str(caught.value) == (
        "/m/x: node a has SHA-256 bbbbbbbbbbbb, node b cccccccccccc; say whose files are right, e.g. --from a"
    )
    (transfer,) = plan("/m", nodes, "id-b").transfers
    assert (transfer.content, transfer.sources, dict(transfer.targets)) == (OTHER, ("id-b",), {"id-a": 0})


def test_files_that_only_others_have_are_named_and_stay() -> None:
    nodes = [holding("a", x=LARGE), holding("b", x=LARGE, y=SMALL), holding("c", receives=False, z=SMALL)]
    assert plan("/m", nodes, "id-a").transfers == []
    assert further_files(nodes, "id-a") == {"b": ["y"]}


def test_a_commit_that_is_served_no_more_is_not_named() -> None:
    nodes = [holding("a", **{"refs/main": SMALL}), holding("b", **{"refs/main": OTHER, "snapshots/old/x": LARGE})]
    assert further_files(nodes, "id-a") == {}


def test_every_node_whose_disk_is_too_small_is_named_before_anything_is_copied() -> None:
    large = FileContent(3 * GIB, "d" * 64)
    nodes = [holding("a", x=large), holding("b", free=2 * GIB), holding("c", free=0), holding("d", free=3 * GIB)]
    with pytest.raises(FetchError) as caught:
        plan("/m", nodes)
    assert str(caught.value).splitlines() == [
        "node b: /m needs 3.0 GiB more, and 2.0 GiB is free there",
        "node c: /m needs 3.0 GiB more, and 0.0 GiB is free there",
    ]


@pytest.mark.parametrize(("origin", "said"), [("", "no node has a"), ("id-b", "node b has no")])
def test_without_any_file_there_is_nothing_to_fetch(origin: str, said: str) -> None:
    nodes = [holding("b")] if not origin else [holding("a", x=LARGE), holding("b")]
    with pytest.raises(FetchError, match=f"^/m: {said} file there"):
        plan("/m", nodes, origin)
