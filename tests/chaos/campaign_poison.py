"""Requests that harm the engine that takes them, among a thousand others: each costs two replicas at most.

The router's real core on a virtual clock. A poison kills its engine (which says so, or is just gone), freezes it, makes
it send what is no frame, is never prefilled, or is refused, by name or by a failure at every try. Everybody else gets
the undisturbed answer.
"""

from __future__ import annotations

import asyncio
import os
import random
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from megatoken.router.core.request import Request
from megatoken.router.fleet.fleet import Endpoint
from megatoken.router.intake.intake import on_frame
from megatoken.v1 import tokens_pb2
from tests.chaos.outcome import Outcome
from tests.simulation.test_router_chaos import Engine, undisturbed
from tests.support.router_core import LENGTH, CoreFleet

NAME = "poison"
ABOUT = "requests that kill, freeze or confuse an engine before their first token, among 1,000 streams"

POISON: Final = 49_999  # the first prompt token of one; the second says which, the third of what kind
REPLICAS, STREAMS, A_TURN = 8, 1000, 20
TURN_S: Final = 0.02
HANG_S: Final = 2.0
REPLACED_S: Final = 1.0
PATIENT_S: Final = 60.0  # of a request that is never prefilled
LAST_TURN: Final = 10_000
ERROR: Final = tokens_pb2.FINISH_REASON_ERROR
INVALID, DEADLINE, INTERNAL, UNAVAILABLE = 3, 4, 13, 14


class Kind(IntEnum):
    """What it does to the engine."""

    DIES = 0
    GONE = 1  # dies without a word
    HANGS = 2
    GARBLES = 3
    NEVER_PREFILLS = 4
    REFUSED = 5  # as its own fault
    FAILS = 6  # at each try, as the worker's fault


ENDS: Final = {Kind.NEVER_PREFILLS: DEADLINE, Kind.REFUSED: INVALID}  # all others: UNAVAILABLE
MOST_LOST: Final = {Kind.DIES: 2, Kind.GONE: 2, Kind.HANGS: 2, Kind.GARBLES: 2, Kind.NEVER_PREFILLS: 2}


@dataclass(slots=True)
class Sick:
    """One replica's engine and what came over it."""

    engine: Engine
    frozen: bool = False
    steps: int = 0


class Ward:
    """The fleet, turn by turn. A replica that is lost is replaced a while later."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.fleet = CoreFleet(replicas=REPLICAS, max_running=256, resume={"hang_s": HANG_S})
        self.engines = {replica: Sick(Engine()) for replica in self.fleet.replicas}
        self.lost_by: dict[int, int] = {}  # replicas by poison
        self.replacements: list[float] = []
        self.made = REPLICAS

    def turn(self) -> None:
        for replica, sick in list(self.engines.items()):
            link = self.fleet.link(replica)
            if link.cuts:
                self._lose(replica, self._poisons(sick, Kind.HANGS, Kind.NEVER_PREFILLS))
                continue
            if not sick.frozen:
                self._step(replica, sick)
        while self.replacements and self.replacements[0] <= self.fleet.now:
            self.replacements.pop(0)
            self.engines[self.fleet.add_replica(f"m-{self.made}")] = Sick(Engine())
            self.made += 1
        self.fleet.tick(TURN_S)

    def _step(self, replica: Endpoint, sick: Sick) -> None:
        fleet, engine = self.fleet, sick.engine
        engine.take(fleet, replica)
        for kind, code in ((Kind.REFUSED, INVALID), (Kind.FAILS, INTERNAL)):
            for poison in self._poisons(sick, kind):
                slot = next(s for s, stream in engine.streams.items() if stream["tokens"][:2] == [POISON, poison])
                del engine.streams[slot]
                fleet.frame(replica, finish=[tokens_pb2.Finish(stream=slot, reason=ERROR, code=code, message="no")])
        deadly = self._poisons(sick, Kind.DIES, Kind.GONE)
        if deadly:
            if self._poisons(sick, Kind.DIES):
                ends = [tokens_pb2.Finish(stream=s, reason=ERROR, code=14, engine_dead=True) for s in engine.streams]
                fleet.frame(replica, finish=ends)
            self._lose(replica, deadly)
            return
        garblers = self._poisons(sick, Kind.GARBLES)
        if garblers:
            on_frame(fleet.state, replica, b"\xff no frame", fleet.now)
            self._lose(replica, garblers)
            return
        if self._poisons(sick, Kind.HANGS):
            sick.frozen = True
            return
        waiting = {slot: s for slot, s in engine.streams.items() if s["tokens"][0] == POISON}
        for slot in waiting:
            del engine.streams[slot]
        if engine.streams:  # one with nothing that it can prefill makes no step
            sick.steps += 1
        engine.step(fleet, replica, self.rng)
        engine.streams |= waiting
        fleet.frame(replica, load=tokens_pb2.Load(running=len(engine.streams), steps=sick.steps))

    def _poisons(self, sick: Sick, *kinds: Kind) -> list[int]:
        streams = [stream["tokens"] for stream in sick.engine.streams.values()]
        return [tokens[1] for tokens in streams if tokens[0] == POISON and tokens[2] in kinds]

    def _lose(self, replica: Endpoint, poisons: list[int]) -> None:
        for poison in poisons:
            self.lost_by[poison] = self.lost_by.get(poison, 0) + 1
        del self.engines[replica]
        if replica.connected:
            self.fleet.lose(replica)
        self.fleet.state.fleet.remove(replica)
        self.fleet.state.fleet.release(replica)
        self.replacements.append(self.fleet.now + REPLACED_S)


def one_run(seed: int, streams: int, outcome: Outcome) -> None:
    """One fleet, `streams` requests, and one poison of each kind."""
    ward = Ward(seed)
    fleet, rng = ward.fleet, ward.rng
    places = dict(zip(rng.sample(range(streams // 10, streams), len(Kind)), Kind, strict=True))
    requests: list[tuple[Request, list[int], int]] = []
    poisons: list[tuple[Request, Kind]] = []
    while len(requests) < streams:
        for _ in range(A_TURN):  # a burst: many are without a first token when a poison strikes
            kind = places.get(len(requests))
            if kind is not None:
                patience = PATIENT_S if kind is Kind.NEVER_PREFILLS else float("inf")
                poison = fleet.submit((POISON, len(poisons), int(kind)), timeout_s=patience, max_tokens=5)
                poisons.append((poison, kind))
            prompt, count = [rng.randrange(POISON) for _ in range(3)], rng.randrange(1, 60)
            requests.append((fleet.submit(tuple(prompt), max_tokens=count), prompt, count))
        ward.turn()
    for _ in range(LAST_TURN):
        if not fleet.state.live:
            break
        ward.turn()
    outcome.inputs += len(poisons)
    outcome.requests += len(requests) + len(poisons)
    outcome.replicas_lost = (outcome.replicas_lost or 0) + ward.made - REPLICAS + len(ward.replacements)
    _judge_poisons(ward, poisons, seed, outcome)
    _judge_others(fleet, requests, seed, outcome)
    try:
        fleet.check_idle()
    except AssertionError as error:
        outcome.leaked += 1
        outcome.problem(f"seed {seed}: {error}")
    left = sum(bool(replica.ward or replica.trial) for replica in fleet.replicas_now())
    if left:
        outcome.leaked += left
        outcome.problem(f"seed {seed}: {left} replicas are still kept for suspects")


def _judge_poisons(ward: Ward, poisons: list[tuple[Request, Kind]], seed: int, outcome: Outcome) -> None:
    for number, (request, kind) in enumerate(poisons):
        lost = ward.lost_by.get(number, 0)
        excess = lost - MOST_LOST.get(kind, 0)
        if excess > 0:
            outcome.wrong += excess
            outcome.problem(f"seed {seed}: {kind.name} cost {lost} replicas")
        end = ward.fleet.end(request)
        if end is None:
            outcome.lost += 1
            outcome.problem(f"seed {seed}: {kind.name} got no end")
        # One that is never prefilled is a hang where nobody else is, which may come before its deadline.
        elif end.code not in {ENDS.get(kind, UNAVAILABLE)} | ({UNAVAILABLE} if kind is Kind.NEVER_PREFILLS else set()):
            outcome.wrong += 1
            outcome.problem(f"seed {seed}: {kind.name} ended with {end.code}: {end.message}")


def _judge_others(
    fleet: CoreFleet, requests: list[tuple[Request, list[int], int]], seed: int, outcome: Outcome
) -> None:
    fleet.collect()
    got: dict[int, list[int]] = {}
    for frame in fleet.frames:
        at = 0
        for number, count in zip(frame.stream, frame.count or [1] * len(frame.stream), strict=True):
            got.setdefault(number, []).extend(frame.token[at : at + count])
            at += count
    ends = {finish.stream: finish for frame in fleet.frames for finish in frame.finish}
    for request, prompt, count in requests:
        tokens, end = got.get(request.stream, []), ends.get(request.stream)
        expected = undisturbed(prompt, count, 0)
        if end is None or end.reason != LENGTH:
            outcome.lost += 1
            outcome.problem(f"seed {seed}: {request.request_id} ended with {end.message if end else 'nothing'}")
        if tokens != expected[: len(tokens)]:
            outcome.doubled += max(0, len(tokens) - count)
            outcome.wrong += 1
            outcome.problem(f"seed {seed}: {request.request_id} got other tokens")
        elif end is not None and end.reason == LENGTH and len(tokens) < count:
            outcome.lost += count - len(tokens)
            outcome.problem(f"seed {seed}: {request.request_id} got {len(tokens)} of {count} tokens")


async def run(scale: float) -> Outcome:
    """Twenty seeds in full, each with its own thousand streams."""
    outcome = Outcome(simulated=True, replicas_lost=0)
    first = int(os.environ.get("MEGATOKEN_SEED", "1"))
    for seed in range(first, first + max(1, round(20 * scale))):
        one_run(seed, STREAMS, outcome)
        await asyncio.sleep(0)
    return outcome
