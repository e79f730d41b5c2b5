"""Divides what is too large for one message: log probabilities by rows, and the tokens that they belong to with them.

A long prompt's log probabilities come from a worker as one Detail of many MiB, and gRPC clients refuse messages over
4 MiB unless told otherwise. Pure. Called by workers and routers, only for what is too large.
"""

from __future__ import annotations

from typing import Final

from megatoken.v1.tokens_pb2 import Detail, Logprobs

PIECE_BYTES: Final = 1 << 19  # of one piece; half of a message, so that it fits beside others


def prompt_pieces(encoded: bytes) -> tuple[list[bytes], bytes]:
    """(Details with some of the prompt's rows each, in order; what is left, empty for nothing) of one Detail."""
    if len(encoded) <= PIECE_BYTES:
        return [], encoded
    detail = Detail.FromString(encoded)
    prompt = detail.prompt_logprobs
    step = max(1, PIECE_BYTES // (8 * max(1, prompt.width) + 4))
    pieces = [
        Detail(stream=detail.stream, prompt_logprobs=rows_of(prompt, row, row + step)).SerializeToString()
        for row in range(0, len(prompt.rank), step)
    ]
    detail.ClearField("prompt_logprobs")
    return pieces, detail.SerializeToString() if detail.HasField("logprobs") else b""


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
