"""RouterState: everything the router's pure core works on. The functions that change it are in the modules around.

submission (a request arrives) -> placement (it gets a replica) -> intake (frames come back) -> ending (it is over);
recovery (its replica is lost); upkeep (time passes). No I/O: shells hand in `now` and bytes, and are woken through
the sinks and links they gave.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from megatoken.errors import MegatokenError
from megatoken.process.supervise import Faults
from megatoken.router.config import RouterConfig
from megatoken.router.core.due import Due
from megatoken.router.core.request import Request
from megatoken.router.core.retry_budget import RetryBudget
from megatoken.router.core.sink import SessionSink
from megatoken.router.fleet.fleet import Endpoint, EndpointTable, Policy
from megatoken.router.identity.callers import CallerRegistry
from megatoken.router.measures import ModelMeasures, refusal_reason
from megatoken.router.policies.make import make_policy
from megatoken.router.streams.history import TokenPages
from megatoken.router.streams.latency import Latencies
from megatoken.router.streams.ledger import RouterLedger
from megatoken.router.streams.slots import SlotTable
from megatoken.v1 import tokens_pb2
from megatoken.v1.frame_columns_pb2 import GenerateRequest


@dataclass(slots=True)
class RouterState:
    config: RouterConfig
    ledger: RouterLedger
    rng: random.Random
    fleet: EndpointTable
    callers: CallerRegistry = field(default_factory=CallerRegistry)
    slots: SlotTable = field(default_factory=SlotTable)
    pages: TokenPages = field(init=False)
    sinks: list[SessionSink | None] = field(default_factory=list)
    latencies: Latencies = field(default_factory=Latencies)
    nowhere: ModelMeasures = field(default_factory=ModelMeasures)  # of requests for models that are not there
    retries: RetryBudget = field(init=False)
    faults: Faults = field(default_factory=Faults)  # of our own, each while one part of the work was done
    frames: int = 0  # taken in
    live: int = 0  # requests running, queued and resuming
    resuming: int = 0
    held: int = 0  # live requests with held delivery
    draining: bool = False
    membership_connected: bool = False  # the controller answers
    live_bytes: int = 0  # encoded requests that these keep for sending them again
    deadlines: Due = field(default_factory=Due)
    holds: Due = field(default_factory=Due)  # held tokens to pass on
    on_entered: Callable[[GenerateRequest, float], Any] | None = None  # Request.span; may change the message's trace
    on_held: Callable[[], None] | None = None  # a request entered whose tokens may be held: `holds` is to be watched
    on_finished: list[Callable[[Request, tokens_pb2.Finish, float], None]] = field(default_factory=list)
    on_lease_usage: Callable[[Endpoint, tokens_pb2.LeaseUsage, float], None] | None = None  # as workers report it
    ordinal: int = 0  # of requests that bring no id

    def __post_init__(self) -> None:
        self.pages = TokenPages(self.slots)
        resume = self.config.resume
        self.retries = RetryBudget(resume.retry_budget_ratio, resume.retry_budget_floor)

    def policy_of(self, name: str) -> Policy:
        return make_policy(name or self.config.policy)

    def count_refusal(self, model: str, error: MegatokenError) -> None:
        """A request was turned away on its way in."""
        pool = self.fleet.pools.get(model)
        measures = pool.measures if pool is not None else self.nowhere
        measures.refusals[refusal_reason(error, self.draining)] += 1

    def add_sink(self, sink: SessionSink) -> None:
        for index, present in enumerate(self.sinks):
            if present is None:
                sink.index = index
                self.sinks[index] = sink
                return
        sink.index = len(self.sinks)
        self.sinks.append(sink)

    def remove_sink(self, sink: SessionSink) -> None:
        self.sinks[sink.index] = None
        sink.index = -1
