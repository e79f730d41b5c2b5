"""An Arrived: a worker's frame as it came, decoded and checked for what its columns must hold. Called by intake."""

from __future__ import annotations

from dataclasses import dataclass

from megatoken.router.core.state import RouterState
from megatoken.router.fleet.fleet import Endpoint
from megatoken.tokens.frames import Column, MalformedFrame, decode_frame, token_columns
from megatoken.v1.frame_columns_pb2 import Frame


@dataclass(slots=True)
class Arrived:
    """A decoded frame and who sent it."""

    replica: Endpoint
    frame: Frame
    stream: Column
    count: Column | None
    token: Column


def decode(state: RouterState, replica: Endpoint, raw: bytes) -> Arrived:
    """Raises MalformedFrame."""
    frame = decode_frame(raw)
    stream, count, token = token_columns(frame)
    if len(stream) and int(stream.max()) >= state.slots.size:
        raise MalformedFrame(f"stream {int(stream.max())}, but there are {state.slots.size}")
    return Arrived(replica, frame, stream, count, token)
