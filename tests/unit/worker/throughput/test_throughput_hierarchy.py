"""How ranks are grouped for the reduction."""

from __future__ import annotations

from collections import Counter

import pytest

from megatoken.worker.throughput.decide.hierarchy import FLAT_RANKS, reduction_groups


def test_declared_sites_are_the_groups() -> None:
    assert reduction_groups(["oslo", "paris", "oslo"], True) == ["oslo", "paris", "oslo"]


@pytest.mark.parametrize(("sites", "by_site"), [(["a", "b"], False), (["a", "a"], True), ([""], False)])
def test_few_ranks_reduce_flat(sites: list[str], by_site: bool) -> None:
    assert len(set(reduction_groups(sites, by_site))) == 1


@pytest.mark.parametrize("size", [FLAT_RANKS + 1, 64, 100, 999, 1000, 1024])
def test_many_ranks_are_cut_into_about_as_many_blocks_as_a_block_has_ranks(size: int) -> None:
    groups = reduction_groups([""] * size, False)
    sizes = Counter(groups)
    assert len(groups) == size
    assert max(sizes.values()) ** 2 < size + 2 * size**0.5 + 1
    assert len(sizes) <= size**0.5 + 1
    assert groups == sorted(groups, key=lambda label: int(label.split("-")[1]))  # neighbours together


def blocks(*sizes: int) -> list[str]:
    return [f"block-{number}" for number, size in enumerate(sizes) for _ in range(size)]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (0, []),
        (1, blocks(1)),
        (8, blocks(8)),
        (9, blocks(3, 3, 3)),
        (10, blocks(4, 4, 2)),
        (16, blocks(4, 4, 4, 4)),
        (17, blocks(5, 5, 5, 2)),
    ],
)
def test_up_to_eight_ranks_are_one_block_and_more_are_blocks_of_the_root(size: int, expected: list[str]) -> None:
    assert reduction_groups([""] * size, False) == expected
    assert reduction_groups([""] * size, True) == expected
