"""What is too large for a message is divided by rows; nothing is lost, doubled or moved."""

from __future__ import annotations

import pytest

from megatoken.tokens.pieces import PIECE_BYTES, detail_stream, pieces_of, rows_of, token_rows
from megatoken.v1.tokens_pb2 import Detail, Logprobs


def logprobs(rows: int, width: int, first: int = 0) -> Logprobs:
    cells = range(rows * width)
    return Logprobs(width=width, token=cells, logprob=[-0.5 * cell for cell in cells], rank=range(first, first + rows))


@pytest.mark.parametrize(("first", "last", "cells"), [(0, 1, [0, 1]), (1, 3, [2, 3, 4, 5]), (2, 9, [4, 5]), (3, 9, [])])
def test_rows_are_cut_out_with_their_cells(first: int, last: int, cells: list[int]) -> None:
    found = rows_of(logprobs(3, 2, 10), first, last)
    assert (found.width, list(found.token), list(found.rank)) == (2, cells, list(range(10, 13))[first:last])
    assert list(found.logprob) == [-0.5 * cell for cell in cells]


def test_what_fits_is_left_as_it_is() -> None:
    for encoded in (b"", Detail(stream=3, logprobs=logprobs(2, 2)).SerializeToString(), bytes(PIECE_BYTES)):
        assert pieces_of(encoded) == ([], [encoded])


@pytest.mark.parametrize(
    ("width", "step"), [(0, 43_690), (1, 43_690), (5, 11_915), (20, 3196), (65_535, 1), (65_536, 1), (100_000, 1)]
)
def test_each_piece_has_as_many_rows_as_fit_and_one_at_least(width: int, step: int) -> None:
    rows = 2 * step + 1 if width > 1 else 4 * step + 1
    whole = Logprobs(width=width, token=[1] * rows * width, logprob=[1.0] * rows * width, rank=range(rows))
    filler = Logprobs(rank=[2**31] * 200_000)
    prompt, tokens = pieces_of(Detail(stream=8, logprobs=whole, prompt_logprobs=filler).SerializeToString())
    sizes = [len(Detail.FromString(piece).logprobs.rank) for piece in tokens]
    assert sizes == [step] * (rows // step) + [rows % step] * bool(rows % step)
    assert sum(len(Detail.FromString(piece).prompt_logprobs.rank) for piece in prompt) == 200_000


def test_all_rows_come_in_order_each_in_one_piece_of_their_kind() -> None:
    detail = Detail(stream=8, prompt_logprobs=logprobs(40_000, 2), logprobs=logprobs(30_000, 3, 7))
    prompt, tokens = pieces_of(detail.SerializeToString())
    joined = Detail(stream=8)
    for piece in prompt:
        assert not Detail.FromString(piece).HasField("logprobs")
        assert token_rows(piece) == 0
        joined.prompt_logprobs.MergeFrom(Detail.FromString(piece).prompt_logprobs)
    for piece in tokens:
        assert not Detail.FromString(piece).HasField("prompt_logprobs")
        joined.logprobs.MergeFrom(Detail.FromString(piece).logprobs)
    assert joined == detail
    assert {detail_stream(piece) for piece in prompt + tokens} == {8}
    assert max(map(len, prompt + tokens)) < 2 * PIECE_BYTES
    assert sum(map(token_rows, tokens)) == 30_000
