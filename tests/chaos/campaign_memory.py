"""A million short requests with deadlines a day away, held answers, and cancels while nothing serves: memory is flat.

The router's real core on a virtual clock, in rounds of a few hundred requests. What a round leaves behind anywhere (in
a heap, a queue, a table, or just in memory) is there more than a thousand times in the end, so sizes after the first
tenth are compared with those at the end.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import random
from pathlib import Path
from typing import Final

from megatoken.router.core.request import Request
from megatoken.v1 import tokens_pb2
from tests.chaos.outcome import Outcome
from tests.support.router_core import CoreFleet

NAME = "memory"
ABOUT = "a million short requests with long deadlines, cancels in an outage, and held delivery: all sizes flat"

REQUESTS: Final = 1_000_000
A_ROUND: Final = 250
OUTAGE_EVERY: Final = 5  # rounds
TOKENS: Final = 3
DAY_S: Final = 86_400.0
ROUND_S: Final = 0.05
LENGTH: Final = tokens_pb2.FINISH_REASON_LENGTH
CANCELLED: Final = tokens_pb2.FINISH_REASON_CANCELLED
MOST_LEFT: Final = 2 * 64  # entries of ended requests that a heap or queue keeps before it clears up
GROWTH_RATIO, GROWTH_BYTES = 1.05, 8 << 20  # of what the allocator itself does over a run
PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")


def rss_bytes() -> int:
    """Resident memory, with nothing in it that is only waiting to be given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


class Crowd:
    """Three replicas and one client that asks, and sometimes cancels."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        limits = {"max_requests": 1 << 20, "max_queued_requests": 1 << 20}
        self.fleet = CoreFleet(replicas=3, max_running=512, admission=limits)
        self.sent = self.cancelled = 0
        self.tokens = 0
        self.ends: dict[int, int] = {}  # by reason

    def served(self) -> None:
        """A round in which everything is well: some tokens are held back, each request ends by itself."""
        requests = [self._ask() for _ in range(A_ROUND)]
        for made in range(TOKENS):
            for replica in self.fleet.replicas:
                slots = list(self.fleet.link(replica).started)
                if not slots:
                    continue
                last = made == TOKENS - 1
                finish = [tokens_pb2.Finish(stream=slot, reason=LENGTH) for slot in slots] if last else []
                self.fleet.frame(replica, stream=slots, token=[made] * len(slots), finish=finish)
                if last:
                    self.fleet.link(replica).started.clear()
        del requests
        self.fleet.tick(ROUND_S)

    def outage(self) -> None:
        """Nothing serves: all wait, are cancelled, and the fleet comes back to an empty queue."""
        fleet = self.fleet
        for replica in fleet.replicas:
            fleet.lose(replica)
        for request in [self._ask() for _ in range(A_ROUND)]:
            fleet.cancel(request)
            self.cancelled += 1
        fleet.tick(ROUND_S)
        for replica in fleet.replicas:
            fleet.connect(replica)

    def _ask(self) -> Request:
        delivery = self.rng.choice((0, 0, 1, 2))
        self.sent += 1
        return self.fleet.submit((1, 2, 3), DAY_S, max_tokens=TOKENS, delivery=delivery, max_delay_ms=60_000)

    def read(self) -> None:
        """The client reads all that waits for it, and forgets it."""
        outbox = self.fleet.sink.outbox
        while outbox:
            frame = tokens_pb2.Frame.FromString(outbox.take())
            self.tokens += len(frame.token)
            for finish in frame.finish:
                self.ends[finish.reason] = self.ends.get(finish.reason, 0) + 1

    def sizes(self) -> dict[str, int]:
        """What may grow, by name."""
        state, queue = self.fleet.state, self.fleet.pool.queue
        return {
            "deadlines": len(state.deadlines),
            "holds": len(state.holds),
            "queue": len(queue._heap) + len(queue._front) + len(queue._suspects),
            "removed from the queue": len(queue._gone),
            "tenants in the queue": len(queue._finish),
            "requests of the client": len(self.fleet.sink.requests),
            "retry slices": len(state.retries._slices),
            "slots in use": state.slots.taken,
        }

    def left(self) -> dict[str, int]:
        """What should be nothing between two rounds."""
        state = self.fleet.state
        state.pages._reclaim()
        counts = {
            "requests": state.live,
            "bytes of requests": state.live_bytes,
            "held requests": state.held,
            "pages": state.pages.pages_in_use,
            "waiting requests": self.fleet.pool.queue.length,
            "waiting tokens": self.fleet.pool.queue.tokens,
        }
        for replica in self.fleet.replicas:
            counts[f"requests of {replica.name}"] = replica.in_flight
            counts[f"tokens of {replica.name}"] = replica.outstanding_tokens
        return {name: count for name, count in counts.items() if count}


async def run(scale: float) -> Outcome:
    outcome = Outcome(simulated=True)
    seed = int(os.environ.get("MEGATOKEN_SEED", "1"))
    crowd = Crowd(seed)
    rounds = max(40, round(REQUESTS * scale) // A_ROUND)
    early = 0
    columns: tuple[int, int] = (0, 0)
    for number in range(1, rounds + 1):
        if number % OUTAGE_EVERY:
            crowd.served()
        else:
            crowd.outage()
            outcome.inputs += 1
        crowd.read()
        if number == rounds // 10:
            early, columns = rss_bytes(), (crowd.fleet.state.slots.size, crowd.fleet.state.pages.pages)
        if number % 100 == 0:
            await asyncio.sleep(0)
    late = rss_bytes()
    outcome.requests = crowd.sent
    outcome.rss_growth_ratio = round(late / early, 3)
    if late - early > max(GROWTH_BYTES, (GROWTH_RATIO - 1) * early):
        outcome.leaked += 1
        outcome.problem(f"seed {seed}: memory grew from {early >> 10} to {late >> 10} KiB after the first tenth")
    if columns != (crowd.fleet.state.slots.size, crowd.fleet.state.pages.pages):
        outcome.leaked += 1
        outcome.problem(f"seed {seed}: the tables of slots or pages grew after the first tenth")
    for name, size in crowd.sizes().items():
        if size > MOST_LEFT:
            outcome.leaked += size
            outcome.problem(f"seed {seed}: {size} {name}")
    for name, count in crowd.left().items():
        outcome.leaked += count
        outcome.problem(f"seed {seed}: left: {count} {name}")
    _judge_answers(crowd, seed, outcome)
    return outcome


def _judge_answers(crowd: Crowd, seed: int, outcome: Outcome) -> None:
    """By number: each request that was served got all its tokens, and each request one end."""
    served = crowd.sent - crowd.cancelled
    for what, got, wanted in (
        ("tokens", crowd.tokens, served * TOKENS),
        ("whole answers", crowd.ends.get(LENGTH, 0), served),
        ("cancelled requests", crowd.ends.get(CANCELLED, 0), crowd.cancelled),
    ):
        outcome.lost += max(0, wanted - got)
        outcome.doubled += max(0, got - wanted)
        if got != wanted:
            outcome.problem(f"seed {seed}: {got} {what} of {wanted}; ends by reason: {crowd.ends}")
