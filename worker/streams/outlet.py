"""What waits to be written to one caller: the columns of engine steps, merged while the caller is slow.

A caller is a Session or one Generate call. Each engine step adds one part; the caller's writer takes everything that
waits as one frame. So a caller that keeps up gets a frame a step, one that does not gets fewer and larger ones, and
what waits is bounded by what its requests may still produce. Used on the event loop only; knows nothing of gRPC.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np

from megatoken.tokens.frames import U32
from megatoken.tokens.pieces import PIECE_BYTES
from megatoken.v1 import frame_columns_pb2 as columns
from megatoken.v1 import tokens_pb2 as pb
from megatoken.worker.streams.part import StreamPart
from megatoken.worker.streams.pieces import divided

if TYPE_CHECKING:
    from megatoken.worker.leases import LeaseChecks

FRAME_TOKENS: Final = 65_536  # of a merged frame; 768 KiB at most, well under gRPC's default limit of 4 MiB
LOOSE_FINISHES: Final = 65_536  # refusals that may wait; what waits otherwise is bounded by what requests may produce
FRAME_PARTS: Final = 4096  # parts of a merged frame, for those that carry no token
FRAME_USAGE: Final = 4096  # reports of leases in a frame, some 150 KB
WAITING_USAGE: Final = 65_536  # reports that may wait; without its report a lease stays charged in full
FRAME_DETAILS_BYTES: Final = 1 << 20  # of a merged frame, before the last part; that has half of it, or one row


@dataclass(slots=True)
class Taken:
    """What a writer writes next."""

    parts: list[StreamPart]
    load: pb.Load | None
    tokens: int
    usage: list[pb.LeaseUsage] = field(default_factory=list)


class Outlet:
    """The parts that wait for one caller, and the streams it has running."""

    def __init__(self, leases: LeaseChecks | None = None) -> None:
        self.leases = leases  # what the caller's requests need; None: it is a router, and they need none
        self.slots: dict[int, int] = {}  # the caller's stream number -> slot, of those that run
        self.closed = False
        self._parts: deque[StreamPart] = deque()
        self._loose = 0  # waiting ends that no step reported: refusals, mostly
        self._load: pb.Load | None = None
        self._usage: list[pb.LeaseUsage] = []
        self._ready = asyncio.Event()

    @property
    def idle(self) -> bool:
        """Whether nothing runs and nothing waits."""
        return not self.slots and not self._parts

    @property
    def overrun(self) -> bool:
        """Whether the caller goes on sending requests that are refused, and reads no answer."""
        return self._loose > LOOSE_FINISHES

    def push(self, part: StreamPart) -> None:
        """Adds a step's tokens; in several parts where their details are large."""
        if self.closed:
            return
        large = part.details and sum(detail.ByteSize() for detail in part.details) > PIECE_BYTES
        self._parts.extend(divided(part) if large else (part,))
        self._ready.set()

    def finish(self, finish: pb.Finish) -> None:
        """Adds the end of a stream that no step reports."""
        self._loose += 1
        self.push(StreamPart(b"", b"", b"", [], [finish]))

    def state_load(self, load: pb.Load) -> None:
        """Has the next frame carry the worker's load; sends one for it if nothing else waits."""
        self._load = load
        self._ready.set()

    def state_usage(self, usage: pb.LeaseUsage) -> None:
        """Has a frame carry what a leased request used; past WAITING_USAGE it is dropped."""
        if not self.closed and len(self._usage) < WAITING_USAGE:
            self._usage.append(usage)
            self._ready.set()

    def wake(self) -> None:
        """Lets a waiting writer look again, e.g. after the caller closed its half."""
        self._ready.set()

    def close(self) -> None:
        """The caller is gone: drops what waits."""
        self.closed = True
        self._parts.clear()
        self._usage.clear()
        self._ready.set()

    async def wait(self) -> None:
        """Returns when `take` may have something, or when the outlet was woken or closed."""
        await self._ready.wait()
        self._ready.clear()

    def take(self) -> Taken | None:
        """Everything that waits, up to a frame's limits; None when nothing does."""
        load, self._load = self._load, None
        usage: list[pb.LeaseUsage] = []
        if self._usage:
            usage, self._usage = self._usage[:FRAME_USAGE], self._usage[FRAME_USAGE:]
        if not self._parts:
            return Taken([], load, 0, usage) if load is not None or usage else None
        parts: list[StreamPart] = []
        tokens, details = 0, 0
        while self._parts and tokens < FRAME_TOKENS and details < FRAME_DETAILS_BYTES and len(parts) < FRAME_PARTS:
            part = self._parts.popleft()
            parts.append(part)
            tokens += len(part.token) // 4
            if part.details:
                details += sum(detail.ByteSize() for detail in part.details)
        if not self._parts:
            self._loose = 0
        if self._parts or self._usage:
            self._ready.set()
        return Taken(parts, load, tokens, usage)


def encode_frame(taken: Taken) -> bytes:
    """The wire bytes of one Session frame."""
    parts = taken.parts
    if len(parts) == 1:
        part = parts[0]
        frame = columns.Frame(
            stream=part.stream, count=part.count, token=part.token, detail=part.details, finish=part.finishes
        )
    else:
        counted = any(part.count for part in parts)
        frame = columns.Frame(
            stream=b"".join([part.stream for part in parts]),
            count=b"".join([part.count or _ones(part) for part in parts]) if counted else b"",
            token=b"".join([part.token for part in parts]),
            detail=[detail for part in parts for detail in part.details],
            finish=[finish for part in parts for finish in part.finishes],
        )
    if taken.load is not None:
        frame.load.CopyFrom(taken.load)
    if taken.usage:
        frame.usage.extend(taken.usage)
    encoded: bytes = frame.SerializeToString()
    return encoded


def _ones(part: StreamPart) -> bytes:
    return np.ones(len(part.stream) // 4, U32).tobytes()
