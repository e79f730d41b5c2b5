"""What waits to be written to one caller of a worker or a router: parts in order, put together into few frames.

A part is what one engine step, or one frame of a worker, held for the caller. A caller that keeps up gets a frame a
part; one that does not gets fewer and larger ones. Several parts in one frame only repeat stream numbers, which the
contract allows; order within a stream is the order of parts. The tokens in a part may be views of received memory:
nothing is copied before the frame is put together. Pure.
"""

from __future__ import annotations

from collections import deque
from itertools import islice
from typing import Final, NamedTuple

import numpy as np

from megatoken.tokens import wire
from megatoken.tokens.frames import U32, Column
from megatoken.tokens.pieces import detail_stream, pieces_of, token_rows

_LOOSE: Final = 64
MAX_FRAME_BYTES: Final = 1 << 20  # gRPC clients refuse messages over 4 MiB unless told otherwise


class FramePart(NamedTuple):
    """Columns as in Frame (counts None: all one), with Details and Finishes encoded."""

    stream: Column | None
    counts: Column | None
    token: Column | None
    details: list[bytes]
    finishes: list[bytes]

    @property
    def tokens(self) -> int:
        """How many there are of them."""
        return 0 if self.token is None else len(self.token)

    def size_bytes(self) -> int:
        """Of its columns and messages, as they count towards a frame."""
        columns = 0 if self.stream is None or self.token is None else 8 * len(self.stream) + 4 * len(self.token)
        return columns + sum(map(len, self.details)) + sum(map(len, self.finishes))


_NONE: Final[list[bytes]] = []


class FrameOutbox:
    """Unbounded in itself: it holds at most what its requests may still produce, and admission bounds those."""

    def __init__(self) -> None:
        self._parts: deque[FramePart] = deque()
        self._loose = 0  # parts at the end that are still views of received memory
        self.refusals = 0  # ends of requests that were never taken on: nothing else bounds them
        self.urgent = False  # holds a first token or a finish: do not wait

    def __bool__(self) -> bool:
        return bool(self._parts)

    @property
    def tokens(self) -> int:
        """How many wait."""
        return sum(part.tokens for part in self._parts)

    def add_part(self, part: FramePart) -> None:
        """When it raises, nothing was taken, and what waits is all there."""
        if self._loose >= _LOOSE:
            self._tie()
        self._parts.append(part)
        self._loose += 1

    def add_finish(self, finish: bytes) -> None:
        """The end of a stream that had been taken on."""
        self.add_part(FramePart(None, None, None, _NONE, [finish]))
        self.urgent = True

    def add_refusals(self, finishes: list[bytes]) -> None:
        """Ends without a step or a frame of their own, refusals above all: their number tells who reads no answers."""
        if finishes:
            self.add_part(FramePart(None, None, None, _NONE, finishes))
            self.refusals += len(finishes)
            self.urgent = True

    def clear(self) -> None:
        """Drops what waits."""
        self._parts.clear()
        self.refusals = 0
        self._loose = 0
        self.urgent = False

    def _tie(self) -> None:
        """Copies the loose parts into one: the client is slow, and each view keeps a whole frame in memory."""
        count = min(self._loose, len(self._parts))
        made: list[FramePart] = []
        group: list[FramePart] = []
        size = 0
        for part in islice(self._parts, len(self._parts) - count, None):
            size += part.size_bytes()
            if group and size > MAX_FRAME_BYTES:
                made.append(tied(group))
                group, size = [], part.size_bytes()
            group.append(part)
        made.append(tied(group))
        for _ in range(count):
            self._parts.pop()
        self._parts.extend(made)
        self._loose = 0

    def take(self) -> bytes:
        """One encoded Frame of what waits, as much as fits; call again while the outbox is not empty."""
        return encode_frame(self.take_parts())

    def take_parts(self) -> list[FramePart]:
        """What goes into the next frame; nothing when nothing waits."""
        parts: list[FramePart] = []
        size = 0
        while self._parts:
            following = self._parts[0].size_bytes()
            if following > MAX_FRAME_BYTES and self._parts[0].details:
                smaller = divided(self._parts.popleft())
                self._parts.extendleft(reversed(smaller))
                following = smaller[0].size_bytes()
            if parts and size + following > MAX_FRAME_BYTES:
                break
            size += following
            parts.append(self._parts.popleft())
        self._loose = min(self._loose, len(self._parts))
        if not self._parts:
            self.refusals = 0
            self.urgent = False
        return parts


def divided(part: FramePart) -> list[FramePart]:
    """Parts of at most about a frame each, in order; a stream's details stay with the tokens that they belong to."""
    parts: list[FramePart] = []
    details: dict[int, deque[bytes]] = {}
    for encoded in part.details:
        prompt, rest = pieces_of(encoded)
        parts += [FramePart(None, None, None, [piece], _NONE) for piece in prompt]
        for piece in rest:
            details.setdefault(detail_stream(piece), deque()).append(piece)
    if part.stream is not None and part.token is not None:
        parts += _entry_parts(
            part.stream, _ones(part.stream) if part.counts is None else part.counts, part.token, details
        )
    left = [encoded for queue in details.values() for encoded in queue]
    if left or part.finishes or not parts:
        parts.append(FramePart(None, None, None, left, part.finishes))
    return parts


def _entry_parts(stream: Column, counts: Column, token: Column, details: dict[int, deque[bytes]]) -> list[FramePart]:
    """Entry after entry, with as many of its stream's details as have rows for its tokens."""
    parts: list[FramePart] = []
    entries: list[tuple[int, int]] = []
    taken: list[bytes] = []
    begin = at = size = 0

    def close() -> None:
        nonlocal entries, taken, begin, size
        if entries:
            columns = np.array(entries, U32)
            parts.append(FramePart(columns[:, 0], columns[:, 1], token[begin:at], taken, _NONE))
        entries, taken, begin, size = [], [], at, 0

    for number, count in zip(stream.tolist(), counts.tolist(), strict=True):
        queue = details.get(number)
        left = count
        while left:
            covered = left
            if queue:
                size += len(queue[0])
                if size > MAX_FRAME_BYTES:
                    close()
                    size = len(queue[0])
                taken.append(queue.popleft())
                covered = max(1, min(left, token_rows(taken[-1])))
            entries.append((number, covered))
            at += covered
            left -= covered
    close()
    return parts


def tied(parts: list[FramePart]) -> FramePart:
    """One part with the content of several, in memory of its own."""
    columns = [part for part in parts if part.stream is not None and part.token is not None]
    details = [detail for part in parts for detail in part.details]
    finishes = [finish for part in parts for finish in part.finishes]
    if not columns:
        return FramePart(None, None, None, details, finishes)
    counts = None
    if any(part.counts is not None for part in columns):
        counts = np.concatenate([_ones(part.stream) if part.counts is None else part.counts for part in columns])
    stream = np.concatenate([part.stream for part in columns if part.stream is not None])
    token = np.concatenate([part.token for part in columns if part.token is not None])
    return FramePart(stream, counts, token, details, finishes)


def encode_frame(parts: list[FramePart]) -> bytes:
    """The bytes of a Frame that holds the parts in order."""
    columns = [part for part in parts if part.stream is not None]
    pieces: list[bytes] = []
    if columns:
        stream = _joined([part.stream for part in columns])
        token = _joined([part.token for part in columns])
        pieces += (wire.TAG_FRAME_STREAM, wire.varint(len(stream)), stream)
        if any(part.counts is not None for part in columns):
            count = _joined([_ones(part.stream) if part.counts is None else part.counts for part in columns])
            pieces += (wire.TAG_FRAME_COUNT, wire.varint(len(count)), count)
        pieces += (wire.TAG_FRAME_TOKEN, wire.varint(len(token)), token)
    for part in parts:
        for detail in part.details:
            pieces += (wire.TAG_FRAME_DETAIL, wire.varint(len(detail)), detail)
    for part in parts:
        for finish in part.finishes:
            pieces += (wire.TAG_FRAME_FINISH, wire.varint(len(finish)), finish)
    return b"".join(pieces)


def _ones(stream: Column | None) -> Column:
    return np.ones(0 if stream is None else len(stream), U32)


def _joined(columns: list[Column | None]) -> bytes:
    present = [column for column in columns if column is not None]
    if len(present) == 1:
        return present[0].tobytes()
    return np.concatenate(present).tobytes()
