"""Divides an engine step's part for one caller where its log probabilities would make too large a message. Pure.

gRPC clients refuse messages over 4 MiB unless told otherwise, and callers straight to a worker may be any. A prompt's
rows go ahead in pieces; generated tokens go with their own rows. Called by outlet.py, only for what is too large.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from megatoken.tokens.frames import U32, Column, column
from megatoken.tokens.pieces import PIECE_BYTES, prompt_pieces, rows_of
from megatoken.v1 import tokens_pb2 as pb
from megatoken.worker.streams.part import StreamPart

_Unit = tuple[int, Column, pb.Detail | None]


def divided(part: StreamPart) -> list[StreamPart]:
    """Parts with at most about PIECE_BYTES of details each, or one row; in order, the finishes in the last."""
    parts: list[StreamPart] = []
    details: dict[int, pb.Detail] = {}
    for detail in part.details:
        pieces, rest = prompt_pieces(detail.SerializeToString())
        parts += [StreamPart(b"", b"", b"", [pb.Detail.FromString(piece)], []) for piece in pieces]
        if rest:
            details[detail.stream] = pb.Detail.FromString(rest)
    units: list[_Unit] = []
    size = 0
    for unit in _units(part, details):
        bytes_of_unit = unit[2].ByteSize() if unit[2] is not None else 0
        if units and size + bytes_of_unit > PIECE_BYTES:
            parts.append(_joined(units))
            units, size = [], 0
        units.append(unit)
        size += bytes_of_unit
    if units:
        parts.append(_joined(units))
    if details or part.finishes or not parts:
        parts.append(StreamPart(b"", b"", b"", list(details.values()), part.finishes))
    return parts


def _units(part: StreamPart, details: dict[int, pb.Detail]) -> Iterator[_Unit]:
    """What may not be divided: a stream's tokens with their rows, or each of them where the rows are large."""
    stream, token = column(part.stream), column(part.token)
    count = column(part.count).tolist() if part.count else [1] * len(stream)
    start = 0
    for number, length in zip(stream.tolist(), count, strict=True):
        tokens = token[start : start + length]
        start += length
        detail = details.pop(number, None)
        if detail is None or length == 1 or detail.ByteSize() <= PIECE_BYTES:
            yield number, tokens, detail
            continue
        for row in range(length):
            one = pb.Detail(stream=number, logprobs=rows_of(detail.logprobs, row, row + 1))
            yield number, tokens[row : row + 1], one


def _joined(units: list[_Unit]) -> StreamPart:
    return StreamPart(
        np.array([number for number, _, _ in units], U32).tobytes(),
        np.array([len(tokens) for _, tokens, _ in units], U32).tobytes(),
        b"".join([tokens.tobytes() for _, tokens, _ in units]),
        [detail for _, _, detail in units if detail is not None],
        [],
    )
