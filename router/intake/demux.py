"""Takes workers' frames apart: whose tokens are these, and which are a stream's first.

Pure numpy over the slot table; the work is per call and per client session in it, never per token. Appends to the
history and moves `generated` on. Called by `tokens.py` with all the frames that came in one moment.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from megatoken.router.streams.history import TokenPages
from megatoken.router.streams.slots import DIRECT, NOBODY, SlotTable
from megatoken.tokens.frames import Column, MalformedFrame

_ARANGE: Final = np.arange(1 << 16, dtype=np.int32)
_MAX_ROUNDS: Final = 64  # tokens of one stream in one frame, up to which whole columns are appended round by round

Index = npt.NDArray[np.integer[Any]]


@dataclass(slots=True)
class Sorted:
    """What a frame's tokens amount to. Streams in `parts` are the client's numbers."""

    parts: list[tuple[int, Column, Column | None, Column]] = field(default_factory=list)  # sink, stream, count, token
    direct: list[tuple[int, bytes]] = field(default_factory=list)  # slot, packed tokens
    first: list[int] = field(default_factory=list)  # slots whose first token this is
    slots: Index = field(default_factory=lambda: np.empty(0, np.intp))  # entries taken, by slot; orphans are left out
    counts: Column | None = None  # of these entries
    tokens: int = 0  # all that came for streams of their replicas, orphans included
    foreign: int = 0  # for streams that their sender does not have: dropped


def sort_frame(
    slots: SlotTable,
    pages: TokenPages,
    replica: int | Index,
    stream: Column,
    count: Column | None,
    token: Column,
    now: float,
) -> Sorted:
    """Sorts the tokens of one frame, or of frames from different replicas put together, by where they go.

    `replica` is the sender's index, or that of each entry. Raises MalformedFrame for a stream number out of range.
    All or nothing: when it raises, history and `generated` are as they were.
    """
    result = Sorted()
    if int(stream.max()) >= slots.size:
        raise MalformedFrame(f"stream {int(stream.max())}, but there are {slots.size}")
    slot: Index = stream.astype(np.intp)
    mine = slots.replica[slot] == replica
    if not mine.all():
        before = len(token)
        slot, count, token = _keep(mine, slot, count, token)
        result.foreign = before - len(token)
    result.tokens = len(token)
    sink = slots.sink[slot]
    if len(sink) and int(sink.min()) < 0:
        held = sink != NOBODY
        if not held.all():
            slot, count, token = _keep(held, slot, count, token)
            sink = sink[held]
    result.slots, result.counts = slot, count
    if not len(slot):
        return result
    slots.last_s[slot] = now
    position = slots.generated[slot]
    try:
        if count is None and not _repeats(slots, slot):
            pages.append_each(slot, position, token)
            slots.generated[slot] = position + 1
            opening = slot[position == 0]
        else:
            opening = _append_many(slots, pages, slot, count, token)
        if len(opening):
            result.first = opening.tolist()
        _split(slots, slot, sink, count, token, result)
    except BaseException:
        slots.generated[slot] = position  # a slot that stands here twice has the same position twice
        pages.trim(slot)
        raise
    return result


def _keep(
    kept: npt.NDArray[np.bool_], slot: Index, count: Column | None, token: Column
) -> tuple[Index, Column | None, Column]:
    if count is None:
        return slot[kept], None, token[kept]
    return slot[kept], count[kept], token[np.repeat(kept, count)]


def _repeats(slots: SlotTable, slot: Index) -> bool:
    """Whether a slot stands in the column twice."""
    n = len(slot)
    ordinal = _ARANGE[:n] if n <= len(_ARANGE) else np.arange(n, dtype=np.int32)
    slots.rank[slot] = ordinal
    return not bool((slots.rank[slot] == ordinal).all())


def _append_many(slots: SlotTable, pages: TokenPages, slot: Index, count: Column | None, token: Column) -> Index:
    """Appends where a stream has several tokens in the frame; returns the slots that had none before."""
    each = slot if count is None else np.repeat(slot, count)
    if not len(each):
        return each
    order = np.argsort(each, kind="stable")
    by_slot, tokens = each[order], token[order]
    opens = np.flatnonzero(np.concatenate(([True], by_slot[1:] != by_slot[:-1])))
    lengths = np.diff(np.append(opens, len(by_slot)))
    owners = by_slot[opens]
    fresh: Index = owners[slots.generated[owners] == 0]
    longest = int(lengths.max())
    if longest > _MAX_ROUNDS:
        for at, length, owner in zip(opens.tolist(), lengths.tolist(), owners.tolist(), strict=True):
            pages.append_run(owner, int(slots.generated[owner]), tokens[at : at + length])
            slots.generated[owner] += length
        return fresh
    for turn in range(longest):
        more = lengths > turn
        position = slots.generated[owners[more]]
        pages.append_each(owners[more], position, tokens[opens[more] + turn])
        slots.generated[owners[more]] = position + 1
    return fresh


def _split(
    slots: SlotTable, slot: Index, sink: npt.NDArray[np.int32], count: Column | None, token: Column, out: Sorted
) -> None:
    """Cuts the columns by sink; order within a stream is kept because the sort is stable."""
    lead = int(sink[0])
    if lead >= 0 and bool((sink == lead).all()):
        out.parts.append((lead, slots.stream[slot], count, token))
        return
    direct = sink == DIRECT
    if direct.any():
        _take_direct(slot[direct], *_keep(direct, slot, count, token)[1:], out)
        slot, count, token = _keep(~direct, slot, count, token)
        sink = sink[~direct]
        if not len(slot):
            return
    order = np.argsort(sink, kind="stable")
    if count is not None:
        token = token[np.argsort(np.repeat(sink, count), kind="stable")]
        count = count[order]
    else:
        token = token[order]
    sink, stream = sink[order], slots.stream[slot[order]]
    edges = [0, *(np.flatnonzero(sink[1:] != sink[:-1]) + 1).tolist(), len(sink)]
    ends = edges if count is None else np.concatenate(([0], np.cumsum(count, dtype=np.int64)))[edges].tolist()
    for i in range(len(edges) - 1):
        a, b = edges[i], edges[i + 1]
        counts = None if count is None else count[a:b]
        out.parts.append((int(sink[a]), stream[a:b], counts, token[ends[i] : ends[i + 1]]))


def _take_direct(slot: Index, count: Column | None, token: Column, out: Sorted) -> None:
    raw = token.tobytes()
    if count is None:
        out.direct = [(owner, raw[4 * i : 4 * i + 4]) for i, owner in enumerate(slot.tolist())]
        return
    at = 0
    for owner, size in zip(slot.tolist(), count.tolist(), strict=True):
        out.direct.append((owner, raw[4 * at : 4 * (at + size)]))
        at += size
