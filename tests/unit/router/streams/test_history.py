"""Tokens of live streams in pages: what was appended is read back, and pages are used and given back exactly."""

from __future__ import annotations

import random

import numpy as np
import pytest

from megatoken.router.streams.history import PAGE, TokenPages
from megatoken.router.streams.slots import SlotTable


def pages_for(streams: int, pages: int = 64) -> tuple[SlotTable, TokenPages]:
    slots = SlotTable(64)
    for _ in range(streams):
        slots.take(0, 0, 0, object(), 0.0)
    return slots, TokenPages(slots, pages)


def run(slots: SlotTable, history: TokenPages, slot: int, tokens: list[int]) -> None:
    history.append_run(slot, int(slots.generated[slot]), np.array(tokens, np.uint32))
    slots.generated[slot] += len(tokens)


def each(slots: SlotTable, history: TokenPages, tokens: dict[int, int]) -> None:
    at = np.array(list(tokens))
    history.append_each(at, slots.generated[at], np.array(list(tokens.values()), np.uint32))
    slots.generated[at] += 1


@pytest.mark.parametrize(
    ("tokens", "pages"), [(0, 0), (1, 1), (31, 1), (32, 1), (33, 2), (64, 2), (65, 3), (96, 3), (97, 4)]
)
@pytest.mark.parametrize("step", [1, 7, 32, 200])
def test_a_stream_has_as_many_pages_as_its_tokens_fill(tokens: int, pages: int, step: int) -> None:
    slots, history = pages_for(1)
    for first in range(0, tokens, step):
        run(slots, history, 0, list(range(first, min(first + step, tokens))))
    assert (history.pages, history.pages_in_use) == (64, pages)
    assert history.read(0, 0, tokens).tolist() == list(range(tokens))


BOUNDS = [0, 1, 31, 32, 33, 63, 64, 65, 95, 96, 99, 100]


@pytest.mark.parametrize(("start", "stop"), [(a, b) for a in BOUNDS for b in BOUNDS])
def test_any_part_of_a_stream_is_read(start: int, stop: int) -> None:
    slots, history = pages_for(2)
    for first in range(0, 100, 10):  # the pages of two streams lie among each other
        run(slots, history, 1, [7] * 10)
        run(slots, history, 0, list(range(first, first + 10)))
    found = history.read(0, start, stop)
    assert found.tolist() == list(range(start, stop))
    assert found.dtype == np.uint32


@pytest.mark.parametrize("tokens", [32, 64, 96])
def test_the_end_of_a_full_page_is_read(tokens: int) -> None:
    slots, history = pages_for(1)
    run(slots, history, 0, list(range(tokens)))
    assert history.read(0, tokens - 1, tokens).tolist() == [tokens - 1]
    assert history.read(0, 0, 1).tolist() == [0]


def test_one_token_each_for_many_streams_at_once() -> None:
    slots, history = pages_for(3)
    run(slots, history, 1, list(range(100, 131)))  # one before the end of its page
    for turn in range(70):
        each(slots, history, {2: 2000 + turn, 0: turn, 1: 1000 + turn})
    assert history.read(0, 0, 70).tolist() == list(range(70))
    assert history.read(1, 0, 101).tolist() == [*range(100, 131), *range(1000, 1070)]
    assert history.read(2, 0, 70).tolist() == list(range(2000, 2070))
    assert history.pages_in_use == 3 + 4 + 3


def test_what_is_read_is_a_copy() -> None:
    slots, history = pages_for(1)
    run(slots, history, 0, [1, 2, 3])
    history.read(0, 0, 3)[:] = 9
    assert history.read(0, 0, 3).tolist() == [1, 2, 3]


def test_freed_pages_are_used_again_before_there_are_more() -> None:
    slots, history = pages_for(2, pages=4)
    for _ in range(5):
        run(slots, history, 0, list(range(128)))
        assert (history.pages, history.pages_in_use) == (4, 4)
        history.free(0)
        assert slots.page[0] == -1
        slots.generated[0] = 0
    run(slots, history, 1, [5] * 32)
    assert (history.pages, history.pages_in_use) == (4, 1)


def test_a_stream_without_tokens_has_nothing_to_give_back() -> None:
    slots, history = pages_for(2)
    history.free(0)
    run(slots, history, 1, [1] * 40)
    history.free(1)
    history.free(1)
    assert history.pages_in_use == 2


@pytest.mark.parametrize(("freed", "in_use"), [(255, 510), (256, 0), (257, 2)])
def test_freed_chains_are_walked_many_at_once(freed: int, in_use: int) -> None:
    slots, history = pages_for(1, pages=1024)
    for _ in range(freed):
        slots.generated[0] = 0
        run(slots, history, 0, [1] * 33)
        history.free(0)
    assert (history.pages, history.pages_in_use) == (1024, in_use)


@pytest.mark.parametrize(("pages", "grown"), [(1, 1025), (1024, 2048), (2048, 3072), (2050, 3075), (4096, 6144)])
def test_a_pool_that_is_full_grows_by_half_or_by_1024_pages(pages: int, grown: int) -> None:
    slots, history = pages_for(2, pages)
    tokens = [number % 1000 for number in range(pages * PAGE)]
    run(slots, history, 0, tokens)
    assert (history.pages, history.pages_in_use) == (pages, pages)
    run(slots, history, 1, list(range(500, 540)))
    assert (history.pages, history.pages_in_use) == (grown, pages + 2)
    assert history.read(0, 0, len(tokens)).tolist() == tokens
    assert history.read(1, 0, 40).tolist() == list(range(500, 540))
    run(slots, history, 1, [3] * ((grown - pages - 2) * PAGE + 24))
    assert (history.pages, history.pages_in_use) == (grown, grown)
    assert history.read(0, 0, len(tokens)).tolist() == tokens


def test_a_pool_keeps_its_free_pages_when_it_grows() -> None:
    slots, history = pages_for(8, pages=2)
    run(slots, history, 0, [1] * 32)
    each(slots, history, {1: 11, 2: 12, 3: 13})  # one page is free, three are needed
    assert (history.pages, history.pages_in_use) == (1026, 4)
    assert [history.read(slot, 0, 1).tolist() for slot in (0, 1, 2, 3)] == [[1], [11], [12], [13]]


@pytest.mark.parametrize(
    ("tokens", "kept", "pages"), [(100, 0, 0), (100, 1, 1), (100, 32, 1), (100, 33, 2), (100, 64, 2), (100, 97, 4)]
)
def test_pages_beyond_what_counts_are_given_back(tokens: int, kept: int, pages: int) -> None:
    slots, history = pages_for(2)
    run(slots, history, 1, [5] * 40)
    run(slots, history, 0, list(range(tokens)))
    slots.generated[0] = kept
    history.trim(np.array([0, 1, 0]))
    assert history.pages_in_use == pages + 2
    assert history.read(0, 0, kept).tolist() == list(range(kept))
    assert history.read(1, 0, 40).tolist() == [5] * 40
    run(slots, history, 0, [9] * 40)
    assert history.read(0, 0, kept + 40).tolist() == [*range(kept), *[9] * 40]
    assert history.read(1, 0, 40).tolist() == [5] * 40


def test_pages_that_were_given_back_are_used_again() -> None:
    slots, history = pages_for(2, pages=4)
    run(slots, history, 0, list(range(128)))
    slots.generated[0] = 32
    history.trim(np.array([0]))
    run(slots, history, 1, list(range(200, 296)))
    assert (history.pages, history.pages_in_use) == (4, 4)
    assert history.read(0, 0, 32).tolist() == list(range(32))
    assert history.read(1, 0, 96).tolist() == list(range(200, 296))


def test_a_chain_moves_to_another_slot() -> None:
    slots, history = pages_for(2)
    run(slots, history, 0, list(range(50)))
    history.move(0, 1)
    slots.generated[1], slots.generated[0] = 50, 0
    assert slots.page[0] == -1
    assert history.read(1, 0, 50).tolist() == list(range(50))
    run(slots, history, 0, [4])
    assert (history.read(0, 0, 1).tolist(), history.pages_in_use) == ([4], 3)


@pytest.mark.parametrize("seed", range(5))
def test_many_streams_keep_their_own_tokens_however_they_come_and_go(seed: int) -> None:
    rng = random.Random(seed)
    slots, history = pages_for(12, pages=8)
    kept: dict[int, list[int]] = {slot: [] for slot in range(12)}
    for turn in range(400):
        slot = rng.randrange(12)
        if rng.random() < 0.1:
            history.free(slot)
            slots.generated[slot], kept[slot] = 0, []
        elif rng.random() < 0.5:
            tokens = [turn] * rng.randrange(1, 80)
            run(slots, history, slot, tokens)
            kept[slot] += tokens
        else:
            chosen = rng.sample(range(12), rng.randrange(1, 12))
            each(slots, history, dict.fromkeys(chosen, turn))
            for one in chosen:
                kept[one].append(turn)
        assert history.read(slot, 0, len(kept[slot])).tolist() == kept[slot]
    assert [history.read(slot, 0, len(tokens)).tolist() for slot, tokens in kept.items()] == list(kept.values())
