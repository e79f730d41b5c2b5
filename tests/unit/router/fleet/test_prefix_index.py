"""Blocks of prompts, and which replicas are thought to hold them."""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import blake2b

import pytest

from megatoken.router.fleet.prefix_index import BLOCK, MOST, MOST_HASHED, PrefixIndex, block_hashes, cached_tokens
from megatoken.tokens.frames import pack


@dataclass(eq=False)
class Replica:
    prefixes: dict[int, None] = field(default_factory=dict)
    open_at: int = 0


@pytest.mark.parametrize(
    ("tokens", "blocks"),
    [(0, 0), (1, 0), (BLOCK - 1, 0), (BLOCK, 1), (BLOCK + 1, 1), (2 * BLOCK - 1, 1), (2 * BLOCK, 2), (700, 5),
     (MOST_HASHED * BLOCK - 1, 511), (MOST_HASHED * BLOCK, 512), (MOST_HASHED * BLOCK + 1, 512),
     (MOST_HASHED * BLOCK + BLOCK, 512)],
)  # fmt: skip
def test_whole_blocks_are_hashed_up_to_a_bound(tokens: int, blocks: int) -> None:
    assert len(block_hashes(pack(range(tokens)))) == blocks


def test_a_hash_is_of_everything_before_it_the_same_in_every_process() -> None:
    prompt = pack(range(3 * BLOCK))
    expected = [blake2b(b"salt" + prompt[: 4 * BLOCK * n], digest_size=8).digest() for n in (1, 2, 3)]
    assert block_hashes(prompt, "salt") == tuple(int.from_bytes(one, "little") for one in expected)


@pytest.mark.parametrize("known", range(8))
@pytest.mark.parametrize("held", range(8))
def test_cached_are_the_leading_blocks_that_it_holds(known: int, held: int) -> None:
    hashes = tuple(range(100, 107))
    replica = Replica(dict.fromkeys(hashes[:held]))
    assert cached_tokens(replica, hashes[:known]) == 128 * min(known, held)


def test_the_longest_prefix_counts_and_a_closed_replica_does_not() -> None:
    index: PrefixIndex[Replica] = PrefixIndex()
    short, long, closed = Replica(), Replica(open_at=3), Replica(open_at=-1)
    index.record(short, (1, 2))
    index.record(long, (1, 2, 3))
    index.record(closed, (1, 2, 3, 4))
    assert index.holders((1, 2, 3, 4), 8) == [long]
    assert index.holders((1, 2, 9), 8) == [short, long]
    assert index.holders((8, 9), 8) == []
    assert index.holders((), 8) == []
    assert len(index) == 4


@pytest.mark.parametrize(("closed", "found"), [(0, [0, 1]), (1, [1, 2]), (7, [7, 8]), (6, [6, 7]), (8, [])])
def test_so_many_holders_are_named_and_four_times_as_many_looked_at(closed: int, found: list[int]) -> None:
    index: PrefixIndex[Replica] = PrefixIndex()
    replicas = [Replica(open_at=-1 if i < closed else i) for i in range(10)]
    for replica in replicas:
        index.record(replica, (1,))
    holding = [replicas[i] for i in found if i < 8]
    assert index.holders((1,), 2) == holding


def test_what_was_recorded_again_counts_as_used_last_and_is_held_once() -> None:
    index: PrefixIndex[Replica] = PrefixIndex()
    replica = Replica()
    index.record(replica, (1, 2, 3))
    assert list(replica.prefixes) == [3, 2, 1]  # the first block outlives what builds on it
    index.record(replica, (1, 4))
    assert list(replica.prefixes) == [3, 2, 4, 1]
    assert index.holders((1,), 8) == [replica]
    index.forget(replica)
    assert (replica.prefixes, len(index), index.holders((1,), 8)) == ({}, 0, [])


@pytest.mark.parametrize(("blocks", "oldest"), [(MOST - 1, 0), (MOST, 0), (MOST + 1, 1), (MOST + 5, 5)])
def test_the_oldest_blocks_beyond_the_bound_are_dropped(blocks: int, oldest: int) -> None:
    index: PrefixIndex[Replica] = PrefixIndex()
    replica = Replica()
    for block in range(blocks):
        index.record(replica, (block,))
    assert next(iter(replica.prefixes)) == oldest
    assert len(replica.prefixes) == len(index) == min(blocks, MOST)


def test_one_replica_is_forgotten_and_others_are_not() -> None:
    index: PrefixIndex[Replica] = PrefixIndex()
    lost, other = Replica(), Replica()
    index.record(lost, (1, 2))
    index.record(other, (1,))
    index.forget(lost)
    assert (len(index), index.holders((1, 2), 8), index.holders((2,), 8)) == (1, [other], [])
