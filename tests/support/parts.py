"""Parts of frames from plain lists."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from megatoken.tokens.frames import U32
from megatoken.tokens.outbox import FramePart
from megatoken.v1 import tokens_pb2 as pb


def frame_part(
    streams: Sequence[int] = (),
    tokens: Sequence[int] = (),
    counts: Sequence[int] | None = None,
    details: Iterable[pb.Detail] = (),
    finishes: Iterable[pb.Finish] = (),
) -> FramePart:
    """What one engine step made for one caller; without streams only its messages."""
    return FramePart(
        np.array(streams, U32) if streams else None,
        None if counts is None else np.array(counts, U32),
        np.array(tokens, U32) if streams else None,
        [detail.SerializeToString() for detail in details],
        [finish.SerializeToString() for finish in finishes],
    )
