"""Frames as columns: numpy views of the packed columns of a `Frame`, without per-token Python.

`frame_columns_pb2` declares the same bytes as `tokens_pb2` with packed columns as bytes. Everything here reads and
writes those.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError

from megatoken.v1.frame_columns_pb2 import Frame

U32: Final = np.dtype("<u4")
Column = npt.NDArray[np.uint32]
EMPTY: Final[Column] = np.empty(0, U32)


class MalformedFrame(ValueError):
    """The columns of a frame do not fit together: the peer is broken or hostile."""


def decode_frame(raw: bytes) -> Frame:
    """A Frame from its bytes. Raises MalformedFrame."""
    try:
        return Frame.FromString(raw)
    except DecodeError:
        raise MalformedFrame(f"{len(raw)} bytes that are not a Frame") from None


def column(raw: bytes) -> Column:
    """A read-only view of a packed fixed32 column."""
    if len(raw) % 4:
        raise MalformedFrame(f"a column of {len(raw)} bytes is not a whole number of 32-bit values")
    return np.frombuffer(raw, U32)


def pack(values: npt.ArrayLike) -> bytes:
    """The bytes of a packed fixed32 column. Values must fit 32 unsigned bits."""
    return np.asarray(values, U32).tobytes()


def token_columns(frame: Frame) -> tuple[Column, Column | None, Column]:
    """(stream, count, token) of a frame; count is None when every count is 1. Checks that the lengths fit."""
    stream, token = column(frame.stream), column(frame.token)
    if not frame.count:
        if len(stream) != len(token):
            raise MalformedFrame(f"{len(stream)} streams with one token each, but {len(token)} tokens")
        return stream, None, token
    count = column(frame.count)
    if len(count) != len(stream):
        raise MalformedFrame(f"{len(stream)} streams, but {len(count)} counts")
    if int(count.sum(dtype=np.uint64)) != len(token):
        raise MalformedFrame(f"counts add up to {int(count.sum(dtype=np.uint64))}, but there are {len(token)} tokens")
    return stream, count, token
