"""The worker's end of one caller: the streams that it has running, and what waits to be written to it.

A caller is a Session or one Generate call. Each engine step adds one part, and the caller's writer takes as much as a
frame holds; what waits is bounded by what the caller's requests may still produce. Used on the event loop only; knows
nothing of gRPC.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from megatoken.tokens.outbox import FrameOutbox, FramePart, encode_frame
from megatoken.v1 import frame_columns_pb2 as columns
from megatoken.v1 import tokens_pb2 as pb

if TYPE_CHECKING:
    from megatoken.worker.leases import LeaseChecks

LOOSE_FINISHES: Final = 65_536  # refusals that may wait; what waits otherwise is bounded by what requests may produce
FRAME_USAGE: Final = 4096  # reports of leases in a frame, some 150 KB
WAITING_USAGE: Final = 65_536  # reports that may wait; without its report a lease stays charged in full


@dataclass(slots=True)
class Taken:
    """What a writer writes next."""

    parts: list[FramePart]
    load: pb.Load | None = None
    usage: list[pb.LeaseUsage] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """How many there are in it."""
        return sum(part.tokens for part in self.parts)

    def frame(self) -> bytes:
        """As an encoded Frame of a Session."""
        encoded = encode_frame(self.parts)
        if self.load is not None or self.usage:
            encoded += columns.Frame(load=self.load, usage=self.usage).SerializeToString()
        return encoded


class Outlet:
    """The parts that wait for one caller, and the streams it has running."""

    def __init__(self, leases: LeaseChecks | None = None) -> None:
        self.leases = leases  # what the caller's requests need; None: it is a router, and they need none
        self.slots: dict[int, int] = {}  # the caller's stream number -> slot, of those that run
        self.closed = False
        self._outbox = FrameOutbox()
        self._load: pb.Load | None = None
        self._usage: list[pb.LeaseUsage] = []
        self._ready = asyncio.Event()

    @property
    def idle(self) -> bool:
        """Whether nothing runs and nothing waits."""
        return not self.slots and not self._outbox

    @property
    def overrun(self) -> bool:
        """Whether the caller goes on sending requests that are refused, and reads no answer."""
        return self._outbox.refusals > LOOSE_FINISHES

    def push(self, part: FramePart) -> None:
        """Adds a step's tokens."""
        if not self.closed:
            self._outbox.add_part(part)
            self._ready.set()

    def finish(self, finish: pb.Finish) -> None:
        """Adds the end of a stream that no step reports."""
        if not self.closed:
            self._outbox.add_refusals([finish.SerializeToString()])
            self._ready.set()

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

    def close(self) -> int:
        """The caller is gone: drops what waits, and returns how many tokens that was."""
        self.closed = True
        dropped = self._outbox.tokens
        self._outbox.clear()
        self._usage.clear()
        self._ready.set()
        return dropped

    async def wait(self) -> None:
        """Returns when `take` may have something, or when the outlet was woken or closed."""
        await self._ready.wait()
        self._ready.clear()

    def take(self) -> Taken | None:
        """What waits, up to a frame's limits; None when nothing does."""
        load, self._load = self._load, None
        usage: list[pb.LeaseUsage] = []
        if self._usage:
            usage, self._usage = self._usage[:FRAME_USAGE], self._usage[FRAME_USAGE:]
        parts = self._outbox.take_parts()
        if self._outbox or self._usage:
            self._ready.set()
        return Taken(parts, load, usage) if parts or load is not None or usage else None
