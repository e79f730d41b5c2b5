"""Frames taken apart: whose tokens are whose, which are a stream's first, and that a failure leaves nothing behind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from megatoken.router.intake.demux import Sorted, sort_frame
from megatoken.router.streams.history import TokenPages
from megatoken.router.streams.slots import DIRECT, NOBODY, SlotTable
from megatoken.tokens.frames import U32, MalformedFrame

Parts = list[tuple[int, list[int], list[int] | None, list[int]]]


def table(*sinks: int, size: int = 8) -> tuple[SlotTable, TokenPages]:
    """Slots 0, 1, ... of replica 0 with these sinks; the client's number of slot i is 100 + i."""
    slots = SlotTable(size)
    for slot, sink in enumerate(sinks):
        assert slots.take(0, sink, 100 + slot, object(), 1.0) == slot
    return slots, TokenPages(slots)


def sort(
    slots: SlotTable, pages: TokenPages, stream: list[int], count: list[int] | None, token: list[int], sender: Any = 0
) -> Sorted:
    counts = None if count is None else np.array(count, U32)
    return sort_frame(slots, pages, sender, np.array(stream, U32), counts, np.array(token, U32), 9.0)


def parts_of(found: Sorted) -> Parts:
    return [
        (sink, stream.tolist(), None if count is None else count.tolist(), token.tolist())
        for sink, stream, count, token in found.parts
    ]


def history(slots: SlotTable, pages: TokenPages, slot: int) -> list[int]:
    tokens: list[int] = pages.read(slot, 0, int(slots.generated[slot])).tolist()
    return tokens


@pytest.mark.parametrize(
    ("sinks", "stream", "count", "token", "parts", "direct"),
    [
        ((0, 0), [1, 0], None, [5, 6], [(0, [101, 100], None, [5, 6])], []),
        ((0, 0), [1, 0], [2, 1], [5, 6, 7], [(0, [101, 100], [2, 1], [5, 6, 7])], []),
        ((0, 0), [1, 1], None, [5, 6], [(0, [101, 101], None, [5, 6])], []),
        ((1, 0), [0, 1], None, [5, 6], [(0, [101], None, [6]), (1, [100], None, [5])], []),
        (
            (2, 0, 2, 1), [0, 1, 2, 3], None, [5, 6, 7, 8],
            [(0, [101], None, [6]), (1, [103], None, [8]), (2, [100, 102], None, [5, 7])], [],
        ),
        (
            (2, 0, 2, 1), [0, 1, 2, 3], [1, 2, 3, 1], [1, 2, 3, 4, 5, 6, 7],
            [(0, [101], [2], [2, 3]), (1, [103], [1], [7]), (2, [100, 102], [1, 3], [1, 4, 5, 6])], [],
        ),
        ((DIRECT, DIRECT), [1, 0], None, [5, 6], [], [(1, [5]), (0, [6])]),
        ((DIRECT, DIRECT), [1, 0], [2, 1], [5, 6, 7], [], [(1, [5, 6]), (0, [7])]),
        ((DIRECT,) * 3, [0, 1, 2], None, [5, 6, 7], [], [(0, [5]), (1, [6]), (2, [7])]),
        ((DIRECT,) * 3, [0, 1, 2], [1, 2, 1], [5, 6, 7, 8], [], [(0, [5]), (1, [6, 7]), (2, [8])]),
        ((0, DIRECT, 0), [0, 1, 2], None, [5, 6, 7], [(0, [100, 102], None, [5, 7])], [(1, [6])]),
        (
            (0, DIRECT, 1), [0, 1, 2], [2, 2, 1], [5, 6, 7, 8, 9],
            [(0, [100], [2], [5, 6]), (1, [102], [1], [9])], [(1, [7, 8])],
        ),
        ((DIRECT, 0), [0, 1], [2, 1], [5, 6, 7], [(0, [101], [1], [7])], [(0, [5, 6])]),
        ((NOBODY, 0), [0, 1], None, [5, 6], [(0, [101], None, [6])], []),
        ((NOBODY, 0), [0, 1], [2, 1], [5, 6, 7], [(0, [101], [1], [7])], []),
        ((NOBODY, DIRECT), [0, 1], [2, 1], [5, 6, 7], [], [(1, [7])]),
        ((NOBODY,), [0], None, [5], [], []),
    ],
)  # fmt: skip
def test_each_session_gets_its_own_columns_and_direct_slots_theirs(
    sinks: tuple[int, ...],
    stream: list[int],
    count: list[int] | None,
    token: list[int],
    parts: Parts,
    direct: list[tuple[int, list[int]]],
) -> None:
    slots, pages = table(*sinks)
    found = sort(slots, pages, stream, count, token)
    assert parts_of(found) == parts
    assert [(slot, np.frombuffer(packed, U32).tolist()) for slot, packed in found.direct] == direct
    assert (found.tokens, found.foreign) == (len(token), 0)


@pytest.mark.parametrize("count", [None, [1, 2, 1]])
def test_tokens_of_streams_that_their_sender_does_not_have_are_dropped(count: list[int] | None) -> None:
    slots, pages = table(0, 0, 0)
    slots.replica[1] = 1
    token = [5, 6, 7, 8] if count else [5, 6, 8]
    found = sort(slots, pages, [0, 1, 2], count, token)
    assert parts_of(found) == [(0, [100, 102], [1, 1] if count else None, [5, 8])]
    assert (found.tokens, found.foreign, found.slots.tolist()) == (2, 2 if count else 1, [0, 2])
    assert slots.generated[:3].tolist() == [1, 0, 1]
    assert slots.last_s[:3].tolist() == [9.0, 1.0, 9.0]
    both = sort(slots, pages, [0, 1, 2], None, [1, 2, 3], np.array([0, 1, 1]))
    assert (both.tokens, both.foreign, both.slots.tolist()) == (2, 1, [0, 1])


@pytest.mark.parametrize("count", [None, [2, 1]])
def test_a_frame_of_foreign_streams_alone_leaves_nothing(count: list[int] | None) -> None:
    slots, pages = table(0, 0)
    found = sort(slots, pages, [0, 1], count, [5, 6, 7][: sum(count or [1, 1])], 1)
    assert (found.parts, found.direct, found.tokens, found.foreign) == ([], [], 0, sum(count or [1, 1]))
    assert slots.generated[:2].tolist() == [0, 0]


@pytest.mark.parametrize(("stream", "fits"), [(7, True), (8, False), (9, False)])
def test_a_stream_beyond_the_table_is_malformed(stream: int, fits: bool) -> None:
    slots, pages = table(*(0,) * 8)
    if fits:
        assert parts_of(sort(slots, pages, [stream], None, [5])) == [(0, [107], None, [5])]
    else:
        with pytest.raises(MalformedFrame, match=f"stream {stream}, but there are 8"):
            sort(slots, pages, [stream], None, [5])


@pytest.mark.parametrize(
    ("stream", "count", "first"),
    [
        ([1, 2], None, [2]),
        ([0, 1, 2], None, [0, 2]),
        ([2, 1, 0], [2, 1, 1], [0, 2]),
        ([2, 2], None, [2]),
        ([1], None, []),
    ],
)
def test_a_stream_s_first_token_is_told_once(stream: list[int], count: list[int] | None, first: list[int]) -> None:
    slots, pages = table(0, 0, 0)
    sort(slots, pages, [1], None, [9])
    found = sort(slots, pages, stream, count, list(range(sum(count or [1] * len(stream)))))
    assert sorted(found.first) == first
    assert sort(slots, pages, stream, count, list(range(sum(count or [1] * len(stream))))).first == []


@pytest.mark.parametrize("long", [1, 2, 31, 32, 33, 63, 64, 65, 66, 200])
@pytest.mark.parametrize("before", [0, 1, 31])
def test_the_history_of_each_stream_has_its_tokens_in_order_however_many_come_at_once(long: int, before: int) -> None:
    slots, pages = table(0, 0, 0)
    for i in range(before):
        sort(slots, pages, [0, 2], None, [1000 + i, 2000 + i])
    mine, other = list(range(3000, 3000 + long)), list(range(5000, 5003))
    sort(slots, pages, [0, 2, 0, 1], [long, 2, 1, 1], [*mine, *other[:2], 7, 8])
    assert history(slots, pages, 0) == [*range(1000, 1000 + before), *mine, 7]
    assert history(slots, pages, 1) == [8]
    assert history(slots, pages, 2) == [*range(2000, 2000 + before), *other[:2]]


def test_a_stream_that_is_named_twice_without_counts_gets_both_tokens() -> None:
    slots, pages = table(0, 1)
    found = sort(slots, pages, [0, 1, 0], None, [5, 6, 7])
    assert parts_of(found) == [(0, [100, 100], None, [5, 7]), (1, [101], None, [6])]
    assert (history(slots, pages, 0), history(slots, pages, 1)) == ([5, 7], [6])
    assert slots.generated[:2].tolist() == [2, 1]


@pytest.mark.parametrize("entries", [(1 << 16) - 1, 1 << 16, (1 << 16) + 1])
def test_a_frame_of_more_than_65536_streams_is_sorted_as_any_other(entries: int) -> None:
    slots, pages = table(*(0,) * entries, size=1 << 17)
    found = sort(slots, pages, list(range(entries)), None, list(range(entries)))
    assert (len(found.first), found.tokens) == (entries, entries)
    assert slots.generated[:entries].tolist() == [1] * entries
    twice = [*range(entries - 1), 0]
    sort(slots, pages, twice, None, list(range(entries)))
    assert (int(slots.generated[0]), int(slots.generated[1])) == (3, 2)


@pytest.mark.parametrize("count", [None, [1, 2]])
def test_a_frame_that_cannot_be_split_leaves_history_and_counts_as_they_were(
    count: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots, pages = table(0, 0)
    sort(slots, pages, [0, 1], None, [1, 2])
    in_use = pages.pages_in_use
    monkeypatch.setattr("megatoken.router.intake.demux._split", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sort(slots, pages, [0, 1], count, [3, 4, 5] if count else [3, 4])
    assert slots.generated[:2].tolist() == [1, 1]
    assert (history(slots, pages, 0), pages.pages_in_use) == ([1], in_use)


def test_entries_of_no_tokens_are_taken_and_open_nothing() -> None:
    slots, pages = table(0, 0)
    found = sort(slots, pages, [0, 1], [0, 0], [])
    assert (found.first, found.tokens, slots.generated[:2].tolist()) == ([], 0, [0, 0])
