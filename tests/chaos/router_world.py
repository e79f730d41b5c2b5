"""A router's real core on a virtual clock, with several clients, whose frames arrive in batches as from an inbox.

Engines are those of the simulation of losses: each next token is a function of all that came before it, so that an
answer that was put together wrongly anywhere shows. Used by campaigns.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any, Final

from megatoken.process.supervise import Faults
from megatoken.router.core.lifecycle import RequestState
from megatoken.router.core.request import Request
from megatoken.router.core.sink import SessionSink
from megatoken.router.fleet.fleet import Endpoint
from megatoken.router.intake.intake import on_frames
from megatoken.v1 import tokens_pb2
from tests.chaos.outcome import Outcome
from tests.simulation.test_router_chaos import Engine, undisturbed
from tests.support.router_core import CoreFleet

TURN_S: Final = 0.02
LENGTH: Final = tokens_pb2.FINISH_REASON_LENGTH


class BatchFleet(CoreFleet):
    """Frames wait until `drain` takes them in together."""

    def __init__(self, **settings: Any) -> None:
        self.batch: list[tuple[Endpoint, bytes]] = []
        super().__init__(**settings)
        self.state.faults = Faults()

    def frame(self, replica: Endpoint, **fields: Any) -> None:
        self.batch.append((replica, tokens_pb2.Frame(**fields).SerializeToString()))

    def drain(self) -> None:
        batch, self.batch = self.batch, []
        on_frames(self.state, batch, self.now)


@dataclass
class Asked:
    """One request and what it should get."""

    request: Request
    sink: SessionSink
    prompt: list[int]
    count: int
    seed: int
    cancelled: bool = False


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    ends: list[tokens_pb2.Finish] = field(default_factory=list)


class World:
    """`replicas` engines and three clients; `turn` is one step of every engine."""

    def __init__(self, seed: int, replicas: int = 4, **settings: Any) -> None:
        self.rng = random.Random(seed)
        given = {"resume": {"max_resumes": 1000, "wait_s": 1e6}, "breaker": {"failures": 10**6}}
        self.fleet = BatchFleet(replicas=replicas, max_running=8, **(given | settings))
        self.engines = {replica.index: Engine() for replica in self.fleet.replicas}
        self.sinks = [self.fleet.sink, SessionSink(), SessionSink()]
        for sink in self.sinks[1:]:
            self.fleet.state.add_sink(sink)
        self.asked: list[Asked] = []
        self.answers: dict[tuple[int, int], Answer] = {}

    def ask(self, count: int, timeout_s: float = float("inf"), **fields: Any) -> Asked:
        fleet, rng = self.fleet, self.rng
        prompt = [rng.randrange(50_000) for _ in range(rng.randrange(1, 5))]
        seed = int(fields.get("seed", 0))
        fleet.sink = sink = rng.choice(self.sinks)
        request = fleet.submit(tuple(prompt), timeout_s, max_tokens=count, **fields)
        self.asked.append(Asked(request, sink, prompt, count, seed))
        return self.asked[-1]

    def turn(self) -> None:
        fleet = self.fleet
        for replica in fleet.replicas:
            if not replica.connected:
                self.engines[replica.index] = Engine()
                fleet.connect(replica)
            self.engines[replica.index].take(fleet, replica)  # type: ignore[arg-type]
            self.engines[replica.index].step(fleet, replica, self.rng)
        fleet.drain()
        self.collect()

    def collect(self) -> None:
        """Reads what every client was sent."""
        for sink in self.sinks:
            while sink.outbox:
                frame = tokens_pb2.Frame.FromString(sink.outbox.take())
                at = 0
                for number, count in zip(frame.stream, frame.count or [1] * len(frame.stream), strict=True):
                    answer = self.answers.setdefault((sink.index, number), Answer())
                    answer.tokens += frame.token[at : at + count]
                    at += count
                for finish in frame.finish:
                    self.answers.setdefault((sink.index, finish.stream), Answer()).ends.append(finish)

    def answer(self, asked: Asked) -> Answer:
        return self.answers.get((asked.sink.index, asked.request.stream), Answer())

    def failed(self) -> list[Asked]:
        """Requests that nobody cancelled and that did not end by themselves."""
        return [a for a in self.asked if not a.cancelled and not any(e.reason == LENGTH for e in self.answer(a).ends)]

    def judge(self, outcome: Outcome, what: str) -> None:
        """No answer has a gap, a doubled or a wrong token; each has one end, and is whole where that says so."""
        for asked in self.asked:
            answer, name = self.answer(asked), f"{what}: {asked.request.request_id}"
            if len(answer.ends) != 1:
                outcome.lost += not answer.ends
                outcome.doubled += max(0, len(answer.ends) - 1)
                outcome.problem(f"{name} has {len(answer.ends)} ends, it is {asked.request.state}")
                continue
            expected = undisturbed(asked.prompt, asked.count, asked.seed)
            if answer.tokens != expected[: len(answer.tokens)]:
                outcome.doubled += max(0, len(answer.tokens) - asked.count)
                outcome.wrong += 1
                outcome.problem(f"{name} got other tokens than undisturbed")
            elif answer.ends[0].reason == LENGTH and len(answer.tokens) < asked.count:
                outcome.lost += asked.count - len(answer.tokens)
                outcome.problem(f"{name} got {len(answer.tokens)} of {asked.count} tokens")

    def left(self) -> list[str]:
        """What should be nothing once every request has ended."""
        fleet, state = self.fleet, self.fleet.state
        for replica in fleet.replicas:
            if replica.connected:
                self.engines[replica.index].take(fleet, replica)  # confirms what was cancelled
        fleet.drain()
        state.pages._reclaim()
        counts = {
            "requests": state.live,
            "bytes of requests": state.live_bytes,
            "held requests": state.held,
            "requests of clients": sum(len(sink.requests) for sink in self.sinks),
            "waiting requests": fleet.pool.queue.length,
            "waiting tokens": fleet.pool.queue.tokens,
            "slots": state.slots.taken,
            "pages": state.pages.pages_in_use,
        }
        for replica in fleet.replicas:
            counts[f"requests of {replica.name}"] = replica.in_flight
            counts[f"outstanding tokens of {replica.name}"] = replica.outstanding_tokens
            counts[f"lone tries of {replica.name}"] = int(replica.trial is not None)
        unfinished = sum(asked.request.state is not RequestState.FINISHED for asked in self.asked)
        return [f"{count} {name}" for name, count in (counts | {"unfinished": unfinished}).items() if count]
