"""One engine step's tokens for one caller: what the stream table makes and the outlet writes."""

from __future__ import annotations

from dataclasses import dataclass

from megatoken.v1 import tokens_pb2 as pb


@dataclass(slots=True)
class StreamPart:
    """One engine step's tokens for one caller, as packed columns."""

    stream: bytes
    count: bytes  # empty: one token a stream
    token: bytes
    details: list[pb.Detail]
    finishes: list[pb.Finish]
