"""The router's pure core without network or clock: scripted workers, and clients that collect what they are sent.

fleet = CoreFleet(replicas=2)
request = fleet.submit(max_tokens=3)
fleet.tokens(request, 11, 12)          # the replica that has it sends these
fleet.lose(fleet.replica_of(request))  # its session breaks
assert fleet.received(request) == [11, 12]
"""

from __future__ import annotations

import random
from typing import Any

from megatoken.process.supervise import Faults
from megatoken.router.config import RouterConfig
from megatoken.router.core import recovery, upkeep
from megatoken.router.core.request import Request
from megatoken.router.core.sink import SessionSink
from megatoken.router.core.state import RouterState
from megatoken.router.core.submission import cancel, submit
from megatoken.router.fleet.fleet import Endpoint, EndpointTable, Member
from megatoken.router.identity.api_keys import ApiKey
from megatoken.router.identity.callers import Caller
from megatoken.router.intake.intake import on_frame
from megatoken.router.streams.ledger import RouterLedger
from megatoken.tokens.frames import U32, pack
from megatoken.v1 import frame_columns_pb2, tokens_pb2

STOP, LENGTH, CANCELLED, ERROR = 1, 2, 3, 4


class ScriptedLink:
    """What the router told a worker."""

    def __init__(self) -> None:
        self.started: dict[int, tokens_pb2.GenerateRequest] = {}
        self.cancelled: list[int] = []
        self.cuts: list[str] = []
        self.probes = 0

    def send_start(self, slot: int, request: bytes) -> None:
        self.started[slot] = tokens_pb2.GenerateRequest.FromString(request)

    def send_cancel(self, slot: int) -> None:
        self.cancelled.append(slot)

    def probe(self) -> None:
        self.probes += 1

    def cut(self, reason: str) -> None:
        self.cuts.append(reason)


def raise_it(_name: str, error: Exception) -> None:
    raise error


class CoreFleet:
    """`now` is moved by the test."""

    def __init__(self, replicas: int = 2, model: str = "m", max_running: int = 4, **settings: Any) -> None:
        self.now = 100.0
        config = RouterConfig(router="r", **settings)
        self.state = RouterState(
            config, RouterLedger(), random.Random(1), EndpointTable(config.admission, config.breaker)
        )
        self.state.faults = Faults(raise_it)  # in tests a fault is a failure, unless the test puts another in its place
        self.pool = self.state.fleet.add_pool(model, self.state.policy_of(""))
        self.pool.wanted = replicas
        self.max_running = max_running
        self.sink = SessionSink()
        self.state.add_sink(self.sink)
        self.frames: list[tokens_pb2.Frame] = []
        self._next = 0
        self.replicas = [self.add_replica(f"m-{i}") for i in range(replicas)]

    def add_replica(self, name: str, **fields: Any) -> Endpoint:
        given = {
            "max_model_len": 4096,
            "vocab_size": 50_000,
            "max_running": self.max_running,
            "block_size": 16,
            **fields,
        }
        replica = self.state.fleet.add(Member(name, self.pool.model, "x", 1, **given), self.pool)
        self.connect(replica)
        return replica

    def replicas_now(self) -> list[Endpoint]:
        return self.state.fleet.live()

    def connect(self, replica: Endpoint) -> None:
        replica.link = ScriptedLink()
        recovery.connect(self.state, replica, self.now)

    def link(self, replica: Endpoint) -> ScriptedLink:
        if not isinstance(replica.link, ScriptedLink):
            raise RuntimeError(f"{replica.name} is not connected")
        return replica.link

    def submit(
        self,
        prompt: tuple[int, ...] = (1, 2, 3),
        timeout_s: float = float("inf"),
        tenant: str = "t",
        key: ApiKey | None = None,
        **fields: Any,
    ) -> Request:
        """One request, or the first choice of it. Fields of GenerateRequest or of its sampling."""
        message = frame_columns_pb2.GenerateRequest(model=self.pool.model, prompt=pack(prompt))
        message.sampling.temperature = 0.0
        known = {field.name for field in message.DESCRIPTOR.fields}
        for name, value in fields.items():
            target = message if name in known else message.sampling
            if hasattr(value, "DESCRIPTOR"):
                getattr(target, name).CopyFrom(value)
            else:
                setattr(target, name, value)
        self._next += 10
        sink, number = self.sink, self._next
        own = sink.requests
        requests = submit(
            self.state, sink, sink.index, number, message, Caller(tenant, key), self.now + timeout_s, self.now,
            lambda made: own.update({request.stream: request for request in made}),
        )  # fmt: skip
        return requests[0]

    def cancel(self, request: Request) -> None:
        cancel(self.state, request, self.now)

    def replica_of(self, request: Request) -> Endpoint:
        if request.replica is None:
            raise RuntimeError(f"{request.request_id} is {request.state}, no replica has it")
        return request.replica

    def started(self, request: Request) -> tokens_pb2.GenerateRequest:
        """What its replica was sent."""
        return self.link(self.replica_of(request)).started[request.slot]

    def frame(self, replica: Endpoint, **fields: Any) -> None:
        on_frame(self.state, replica, tokens_pb2.Frame(**fields).SerializeToString(), self.now)

    def tokens(self, request: Request, *tokens: int) -> None:
        self.frame(self.replica_of(request), stream=[request.slot], count=[len(tokens)], token=tokens)

    def finish(self, request: Request, reason: int = STOP, **fields: Any) -> None:
        finish = tokens_pb2.Finish(stream=request.slot, reason=reason, **fields)
        self.frame(self.replica_of(request), finish=[finish])

    def lose(self, replica: Endpoint) -> None:
        recovery.lose_replica(self.state, replica, f"lost the session to replica {replica.name}", self.now)

    def tick(self, seconds: float = 0.0) -> None:
        self.now += seconds
        upkeep.flush_due(self.state, self.now)
        upkeep.tick(self.state, self.now, 1e9 + self.now)

    def collect(self) -> None:
        while self.sink.outbox:
            self.frames.append(tokens_pb2.Frame.FromString(self.sink.outbox.take()))

    def received(self, request: Request, choice: int = 0) -> list[int]:
        """All tokens that the client got for it."""
        self.collect()
        found: list[int] = []
        for frame in self.frames:
            at = 0
            for number, count in zip(frame.stream, frame.count or [1] * len(frame.stream), strict=True):
                if number == request.stream + choice:
                    found += frame.token[at : at + count]
                at += count
        return found

    def end(self, request: Request, choice: int = 0) -> tokens_pb2.Finish | None:
        """Its Finish; raises when there are two."""
        self.collect()
        ends = [finish for frame in self.frames for finish in frame.finish if finish.stream == request.stream + choice]
        if len(ends) > 1:
            raise RuntimeError(f"{len(ends)} ends of one stream")
        return ends[0] if ends else None

    def check_idle(self) -> None:
        """Nothing is left of any request."""
        state = self.state
        problems = []
        if state.live or self.sink.requests or self.pool.queue.length or self.pool.queue.tokens:
            problems.append(
                f"{state.live} live, {len(self.sink.requests)} of the client, {self.pool.queue.length} queued"
            )
        for replica in state.fleet.live():
            if replica.in_flight or abs(replica.decode_outstanding) > 1e-6 or abs(replica.prompt_outstanding) > 1e-6:
                problems.append(f"{replica.name}: {replica.in_flight} in flight, {replica.outstanding_tokens} tokens")
        if problems:
            raise AssertionError("; ".join(problems))


__all__ = ["CANCELLED", "ERROR", "LENGTH", "STOP", "U32", "CoreFleet", "ScriptedLink"]
