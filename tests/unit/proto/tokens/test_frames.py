"""Columns of frames: read and written without change, and what does not fit together is refused."""

from __future__ import annotations

import numpy as np
import pytest

from megatoken.tokens.frames import EMPTY, MalformedFrame, column, decode_frame, pack, token_columns
from megatoken.v1.frame_columns_pb2 import Frame


@pytest.mark.parametrize("values", [[], [0], [1, 2, 3], [2**32 - 1, 0, 2**31]])
def test_a_column_is_four_little_endian_bytes_a_value(values: list[int]) -> None:
    assert pack(values) == b"".join(value.to_bytes(4, "little") for value in values)
    assert column(pack(values)).tolist() == values
    assert column(pack(values)).dtype == EMPTY.dtype == np.dtype("<u4")


@pytest.mark.parametrize("size", [1, 2, 3, 5, 6, 7])
def test_bytes_that_are_no_column_are_refused(size: int) -> None:
    with pytest.raises(MalformedFrame, match=f"^a column of {size} bytes is not a whole number of 32-bit values"):
        column(bytes(size))


def frame(streams: int, tokens: int, counts: list[int] | None = None) -> Frame:
    return Frame(stream=pack(range(streams)), token=pack(range(tokens)), count=pack(counts or []))


@pytest.mark.parametrize(("streams", "tokens", "counts"), [(0, 0, None), (2, 2, None), (2, 5, [3, 2]), (2, 1, [0, 1])])
def test_columns_that_fit_are_given_back(streams: int, tokens: int, counts: list[int] | None) -> None:
    stream, count, token = token_columns(frame(streams, tokens, counts))
    assert (stream.tolist(), token.tolist()) == (list(range(streams)), list(range(tokens)))
    assert (None if count is None else count.tolist()) == counts


@pytest.mark.parametrize(
    ("streams", "tokens", "counts", "said"),
    [
        (2, 3, None, "2 streams with one token each, but 3 tokens"),
        (2, 1, None, "2 streams with one token each, but 1 tokens"),
        (2, 3, [3], "2 streams, but 1 counts"),
        (1, 3, [1, 2], "1 streams, but 2 counts"),
        (2, 4, [3, 2], "counts add up to 5, but there are 4 tokens"),
        (2, 6, [3, 2], "counts add up to 5, but there are 6 tokens"),
        (2, 1, [2**32 - 1, 2], f"counts add up to {2**32 + 1}, but there are 1 tokens"),
    ],
)
def test_columns_that_do_not_fit_are_refused(streams: int, tokens: int, counts: list[int] | None, said: str) -> None:
    with pytest.raises(MalformedFrame) as refused:
        token_columns(frame(streams, tokens, counts))
    assert str(refused.value) == said


def test_bytes_are_a_frame_or_refused_by_their_size() -> None:
    assert decode_frame(frame(2, 2).SerializeToString()) == frame(2, 2)
    with pytest.raises(MalformedFrame) as refused:
        decode_frame(b"\xff\xff")
    assert str(refused.value) == "2 bytes that are not a Frame"
