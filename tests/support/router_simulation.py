"""A fleet on a virtual clock around the router's real core: admission, queue, policy, capacity, intake.

An engine step takes `step_s + token_s * batch + prompt_s * prompt tokens`; frames and requests take half a round trip
each way. Everything is drawn from one seed, so a run is repeatable to the token.
"""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatoken.errors import MegatokenError
from megatoken.process.supervise import Faults
from megatoken.router.config import RouterConfig
from megatoken.router.core import recovery, upkeep
from megatoken.router.core.request import Request
from megatoken.router.core.sink import SessionSink
from megatoken.router.core.state import RouterState
from megatoken.router.core.submission import submit
from megatoken.router.fleet.fleet import Endpoint, EndpointTable, Member
from megatoken.router.identity.callers import Caller
from megatoken.router.intake.intake import on_frame
from megatoken.router.streams.ledger import RouterLedger
from megatoken.tokens import wire
from megatoken.tokens.frames import U32, pack
from megatoken.v1 import frame_columns_pb2, tokens_pb2
from tests.support.router_core import raise_it

LOAD_EVERY_S = 0.25


@dataclass(frozen=True)
class Kind:
    """A device generation. At a full batch it makes batch / (step_s + token_s * batch) tokens/s."""

    name: str
    speed: float
    batch: int = 64
    rtt_s: float = 0.01

    @property
    def step_s(self) -> float:
        return 0.016 / self.speed

    @property
    def token_s(self) -> float:
        return 0.00025 / self.speed

    @property
    def prompt_s(self) -> float:
        return 0.00002 / self.speed


@dataclass
class Engine:
    """One replica's engine: a continuous batch."""

    kind: Kind
    waiting: list[tuple[int, int, int]] = field(default_factory=list)  # slot, prompt, tokens to make
    running: dict[int, int] = field(default_factory=dict)  # slot -> tokens left
    stepping: bool = False
    generated: int = 0
    prompted: int = 0
    busy_s: float = 0.0
    load_due_s: float = 0.0

    def begin(self) -> float:
        """Starts a step; how long it takes. 0: nothing to do."""
        prompt = 0
        while self.waiting and len(self.running) < self.kind.batch:
            slot, length, tokens = self.waiting.pop(0)
            self.running[slot] = tokens
            prompt += length
        if not self.running:
            return 0.0
        took = self.kind.step_s + self.kind.token_s * len(self.running) + self.kind.prompt_s * prompt
        self.prompted += prompt
        self.busy_s += took
        return took

    def end(self, now: float) -> bytes:
        """The frame of the step that ends now."""
        slots = list(self.running)
        self.generated += len(slots)
        stream = np.array(slots, U32).tobytes()
        pieces = [wire.delimited(b"\x0a", stream), wire.delimited(b"\x1a", stream)]
        for slot in slots:
            self.running[slot] -= 1
            if self.running[slot] <= 0:
                del self.running[slot]
                finish = tokens_pb2.Finish(stream=slot, reason=tokens_pb2.FINISH_REASON_LENGTH)
                pieces.append(wire.delimited(b"\x2a", finish.SerializeToString()))
        if now >= self.load_due_s:
            self.load_due_s = now + LOAD_EVERY_S
            load = tokens_pb2.Load(
                running=len(slots), waiting=len(self.waiting), prompt_tokens=self.prompted,
                generated_tokens=self.generated, busy_us=int(self.busy_s * 1e6),
            )  # fmt: skip
            pieces.append(wire.delimited(b"\x32", load.SerializeToString()))
        return b"".join(pieces)

    def cancel(self, slot: int) -> bytes:
        self.running.pop(slot, None)
        self.waiting = [entry for entry in self.waiting if entry[0] != slot]
        finish = tokens_pb2.Finish(stream=slot, reason=tokens_pb2.FINISH_REASON_CANCELLED)
        return wire.delimited(b"\x2a", finish.SerializeToString())


class Link:
    """fleet.Link over the virtual clock."""

    def __init__(self, simulation: Simulation, replica: Endpoint, engine: Engine) -> None:
        self.simulation, self.replica, self.engine = simulation, replica, engine

    def send_start(self, slot: int, request: bytes) -> None:
        message = frame_columns_pb2.GenerateRequest.FromString(request)
        entry = (slot, len(message.prompt) // 4, message.sampling.max_tokens)
        self.simulation.after(self.engine.kind.rtt_s / 2, self._arrive, entry)

    def send_cancel(self, slot: int) -> None:
        self.simulation.after(self.engine.kind.rtt_s / 2, self._cancel, slot)

    def probe(self) -> None:
        recovery.probed(self.simulation.state, self.replica, self.simulation.now, well=True)

    def cut(self, reason: str) -> None:
        raise RuntimeError(f"{self.replica.name} was cut: {reason}")

    def _arrive(self, entry: tuple[int, int, int]) -> None:
        self.engine.waiting.append(entry)
        self._step()

    def _cancel(self, slot: int) -> None:
        self.simulation.after(self.engine.kind.rtt_s / 2, self._deliver, self.engine.cancel(slot))

    def _step(self) -> None:
        if self.engine.stepping:
            return
        took = self.engine.begin()
        if took:
            self.engine.stepping = True
            self.simulation.after(took, self._done)

    def _done(self) -> None:
        self.engine.stepping = False
        frame = self.engine.end(self.simulation.now)
        self.simulation.after(self.engine.kind.rtt_s / 2, self._deliver, frame)
        self._step()

    def _deliver(self, frame: bytes) -> None:
        on_frame(self.simulation.state, self.replica, frame, self.simulation.now)


class Sink(SessionSink):
    """Counts what finished requests got, and when the first token came."""

    def __init__(self, simulation: Simulation) -> None:
        super().__init__()
        self.simulation = simulation


@dataclass
class Outcome:
    """Of the measured window."""

    made_tokens: int = 0  # by engines
    good_tokens: int = 0  # of requests that ended well in the window
    refused: int = 0
    failed: int = 0
    finished: int = 0
    first_token_s: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        return self.made_tokens / self.seconds

    @property
    def goodput(self) -> float:
        return self.good_tokens / self.seconds

    def first_token_p99_s(self) -> float:
        return float(np.percentile(self.first_token_s, 99)) if self.first_token_s else float("inf")


class Simulation:
    """`run` once."""

    def __init__(self, kinds: list[Kind], seed: int = 1, **settings: Any) -> None:
        self.now = 0.0
        self.rng = random.Random(seed)
        self._queue: list[tuple[float, int, Any, tuple[Any, ...]]] = []
        self._order = 0
        config = RouterConfig(router="r", **settings)
        self.state = RouterState(
            config, RouterLedger(), random.Random(seed + 1), EndpointTable(config.admission, config.breaker)
        )
        self.state.faults = Faults(raise_it)
        self.state.on_finished.append(self._finished)
        pool = self.state.fleet.add_pool("m", self.state.policy_of(""))
        pool.wanted = len(kinds)
        self.engines: list[Engine] = []
        self.links: list[Link] = []
        for i, kind in enumerate(kinds):
            member = Member(
                f"m-{i}", "m", "x", 1, max_running=kind.batch, max_model_len=1 << 20, device_kind=kind.name
            )  # fmt: skip
            replica = self.state.fleet.add(member, pool)
            replica.rtt_s = kind.rtt_s
            engine = Engine(kind)
            link = Link(self, replica, engine)
            replica.link = link
            self.engines.append(engine)
            self.links.append(link)
            recovery.connect(self.state, replica, 0.0)
        self.outcome = Outcome()
        self.measuring = False
        self.sink = Sink(self)
        self.state.add_sink(self.sink)
        self._stream = 0

    def after(self, seconds: float, call: Any, *arguments: Any) -> None:
        self._order += 1
        heapq.heappush(self._queue, (self.now + seconds, self._order, call, arguments))

    def run(
        self,
        offered_tokens_per_s: float,
        seconds: float,
        warm_s: float,
        *,
        prompt: tuple[int, int] = (32, 256),
        tokens: tuple[int, int] = (32, 288),
        timeout_s: float = float("inf"),
        choose: Any = None,
    ) -> Outcome:
        """Poisson arrivals of the offered load for warm_s + seconds. `choose`: a fixed split instead of the policy."""
        self._load = (prompt, tokens, timeout_s, choose)
        self._gap_s = (tokens[0] + tokens[1]) / 2 / offered_tokens_per_s
        self.after(0.0, self._arrive)
        self.after(0.1, self._tick)
        self._until(warm_s)
        made = sum(engine.generated for engine in self.engines)
        self.measuring = True
        self._until(warm_s + seconds)
        self.outcome.made_tokens = sum(engine.generated for engine in self.engines) - made
        self.outcome.seconds = seconds
        return self.outcome

    def _until(self, end: float) -> None:
        while self._queue and self._queue[0][0] <= end:
            self.now, _, call, arguments = heapq.heappop(self._queue)
            call(*arguments)
        self.now = end

    def _tick(self) -> None:
        upkeep.tick(self.state, self.now, 1e9 + self.now)
        self.sink.outbox.clear()
        self.after(0.1, self._tick)

    def _arrive(self) -> None:
        self.after(self.rng.expovariate(1 / self._gap_s), self._arrive)
        prompt, tokens, timeout_s, _ = self._load
        message = frame_columns_pb2.GenerateRequest(model="m", prompt=pack(np.zeros(self.rng.randint(*prompt))))
        message.sampling.max_tokens = self.rng.randint(*tokens)
        message.sampling.temperature = 0.0
        self._stream += 1
        try:
            submit(
                self.state, self.sink, self.sink.index, self._stream, message, Caller(), self.now + timeout_s, self.now
            )  # fmt: skip
        except MegatokenError:
            self.outcome.refused += self.measuring

    def _finished(self, request: Request, finish: tokens_pb2.Finish, now: float) -> None:
        if not self.measuring:
            return
        if finish.reason == tokens_pb2.FINISH_REASON_LENGTH:
            self.outcome.finished += 1
            self.outcome.good_tokens += finish.generated_tokens
            self.outcome.first_token_s.append(request.first_s - request.arrived_s)
        else:
            self.outcome.failed += 1


class FixedSplit:
    """Weights set by hand: every request to a replica drawn by its weight, room or not."""

    name = "fixed"
    wants_prefix = False

    def __init__(self, weights: list[float]) -> None:
        self._weights = weights

    def choose(self, pool: Any, asked: Any, rng: random.Random) -> Endpoint | None:
        drawn: Endpoint = rng.choices(pool.replicas, self._weights)[0]
        return drawn


# The generations of AMD's mixed MLPerf v6.0 fleet, by their relative speed, in two sites.
MIXED = (
    [Kind("MI300X", 1.0, rtt_s=0.01)] * 4
    + [Kind("MI325X", 1.2, rtt_s=0.12)] * 4
    + [Kind("MI355X", 3.1, rtt_s=0.01)] * 2
    + [Kind("MI355X", 3.1, rtt_s=0.12)] * 2
)


def alone_tokens_per_s(kind: Kind, seconds: float = 12.0) -> float:
    """What one replica of the kind makes by itself, always with more to do than it can."""
    settings = {"admission": {"max_queued_requests": 512, "max_queue_s": 1e9}}
    peak = kind.batch / (kind.step_s + kind.token_s * kind.batch)
    return Simulation([kind], **settings).run(1.3 * peak, seconds, 5.0).tokens_per_s


def mixed_fleet(policy: str, load: float, seconds: float = 40.0, weights: list[float] | None = None) -> Outcome:
    """The mixed fleet at `load` times the sum of its parts alone. `weights`: a fixed split instead of a policy."""
    total = sum(alone_cached(kind) for kind in MIXED)
    settings = {"admission": {"max_queued_requests": 100_000, "max_queue_s": 1e9}}
    simulation = Simulation(MIXED, policy=policy, **settings)
    if weights is not None:
        simulation.state.fleet.pools["m"].policy = FixedSplit(weights)
        for replica in simulation.state.fleet.live():
            replica.limit = 1 << 30
    return simulation.run(load * total, seconds, 12.0)


_ALONE: dict[Kind, float] = {}


def alone_cached(kind: Kind) -> float:
    if kind not in _ALONE:
        _ALONE[kind] = alone_tokens_per_s(kind)
    return _ALONE[kind]
