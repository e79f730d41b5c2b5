"""Divides what is too large for one message: log probabilities by rows, and the tokens that they belong to with them.

A long prompt's log probabilities come from a worker as one Detail of many MiB, and gRPC clients refuse messages over
4 MiB unless told otherwise. Pure. Called by workers and routers, only for what is too large.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from megatoken.v1.tokens_pb2 import Detail, Logprobs

PIECE_BYTES: Final = 1 << 19  # of one piece; half of a message, so that it fits beside others


def pieces_of(encoded: bytes) -> tuple[list[bytes], list[bytes]]:
    """(Details with some of the prompt's rows each, Details with some of the tokens' rows each) of one, in order."""
    if len(encoded) <= PIECE_BYTES:
        return [], [encoded]
    detail = Detail.FromString(encoded)
    prompt = [Detail(stream=detail.stream, prompt_logprobs=rows) for rows in _rows(detail.prompt_logprobs)]
    tokens = [Detail(stream=detail.stream, logprobs=rows) for rows in _rows(detail.logprobs)]
    return [piece.SerializeToString() for piece in prompt], [piece.SerializeToString() for piece in tokens]


def _rows(logprobs: Logprobs) -> Iterator[Logprobs]:
    """In order, as many rows at once as a piece may have; one at least."""
    step = max(1, PIECE_BYTES // (8 * max(1, logprobs.width) + 4))
    for first in range(0, len(logprobs.rank), step):
        yield rows_of(logprobs, first, first + step)


def rows_of(logprobs: Logprobs, first: int, last: int) -> Logprobs:
    """The rows from `first` to before `last`."""
    cells = slice(first * logprobs.width, last * logprobs.width)
    return Logprobs(
        width=logprobs.width,
        token=logprobs.token[cells],
        logprob=logprobs.logprob[cells],
        rank=logprobs.rank[first:last],
    )


def detail_stream(encoded: bytes) -> int:
    """Which stream a Detail is of."""
    return Detail.FromString(encoded).stream


def token_rows(encoded: bytes) -> int:
    """How many generated tokens a Detail belongs to."""
    return len(Detail.FromString(encoded).logprobs.rank)
