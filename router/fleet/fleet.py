"""What the router knows of replicas and models: membership from the controller, load and health from its own traffic.

`Pool.open` lists the replicas of a model that may get a request now. It is kept up to date at every change of a
replica (`EndpointTable.refresh`), so a choice looks at two of them and not at a thousand.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megatoken.router.config import AdmissionConfig, BreakerConfig
from megatoken.router.fleet.affinity_seeds import seed_of
from megatoken.router.fleet.capacity import Capacity, Rates
from megatoken.router.fleet.circuit import Circuit
from megatoken.router.fleet.fair_queue import FairQueue, Queued
from megatoken.router.fleet.prefix_index import PrefixIndex
from megatoken.router.fleet.routing_request import RoutingRequest
from megatoken.router.measures import ModelMeasures


class EndpointLink(Protocol):
    """The router's session to one replica's worker."""

    def send_start(self, slot: int, request: bytes) -> None: ...
    def send_cancel(self, slot: int) -> None: ...
    def probe(self) -> None:
        """Has the engine make a token of the router's own; the shell tells recovery.probed what came of it."""

    def cut(self, reason: str) -> None:
        """Ends the session; the shell reports it lost, and opens another if the replica is still a member."""


@dataclass(frozen=True, slots=True)
class Member:
    """A replica as the controller's snapshot has it."""

    replica: str
    model: str
    address: str
    incarnation: int
    draining: bool = False
    drain_deadline_unix_s: float = 0.0
    node: str = ""
    site: str = ""
    max_model_len: int = 0
    vocab_size: int = 0
    max_running: int = 0
    block_size: int = 0
    engine: str = ""
    device_kind: str = ""
    loras: tuple[str, ...] = ()


@dataclass(slots=True, eq=False)
class Endpoint:
    """One replica in the table. Identity is (name, incarnation): a new incarnation is a new Replica."""

    index: int
    member: Member
    pool: Pool
    circuit: Circuit
    capacity: Capacity
    limit: int  # requests it gets at most
    link: EndpointLink | None = None
    connected: bool = False
    gone: bool = False  # no longer a member; only its last requests keep it
    draining: bool = False
    ejected_until_s: float = 0.0
    open_at: int = -1  # position in pool.open
    in_flight: int = 0
    leased: int = 0
    prompt_outstanding: float = 0.0  # prompt tokens sent whose first token has not come
    decode_outstanding: float = 0.0  # expected tokens still to come
    others: int = 0  # requests that other routers have there, from its last load report
    engine_waiting: int = 0
    running: int = 0
    kv_usage: float = 0.0
    generated_tokens: int = 0  # taken over from it by this router
    alive_s: float = 0.0  # when its engine last showed that it makes steps, or got its first request
    engine_steps: int = -1  # that its worker counted, from its last load report of this session; -1: none yet
    rtt_s: float = 0.0
    step_s: float = 0.0  # usual time of an engine step, from its load reports
    steps: int = 0  # that step_s was smoothed over
    load_totals: tuple[int, int, int, int] | None = None  # prompt, generated, busy_us, steps of the last report
    prefixes: dict[int, None] = field(default_factory=dict)  # see prefix_book
    ward: bool = False  # kept for suspects: takes no other request, see quarantine
    cleared: bool = False  # as a ward, once: all who run there have shown their innocence
    trial: Queued | None = None  # the suspect whose first token is awaited here

    @property
    def name(self) -> str:
        return self.member.replica

    @property
    def wait_s(self) -> float:
        """Seconds of work that it has outstanding, by its measured capacity."""
        return (
            self.decode_outstanding / self.capacity.decode_tokens_per_s
            + self.prompt_outstanding / self.capacity.prefill_tokens_per_s
        )

    @property
    def outstanding_tokens(self) -> int:
        return max(0, round(self.decode_outstanding + self.prompt_outstanding))

    def has_room(self) -> bool:
        return self.in_flight + self.leased + self.others < self.limit


class Policy(Protocol):
    """Chooses replicas for one model's requests."""

    name: str  # as a spec writes it
    wants_prefix: bool  # asks for Question.prefix_hashes

    def choose(self, pool: Pool, asked: RoutingRequest, rng: random.Random) -> Endpoint | None:
        """One of pool.open, or None when there is none."""


@dataclass(slots=True, eq=False)
class Pool:
    """One model."""

    model: str
    policy: Policy
    wanted: int = 0
    blocked: str = ""
    hold_s: float = 0.0  # that requests wait for the first replica, since asking makes one start; 0: none does
    known: bool = True  # in the present snapshot
    replicas: list[Endpoint] = field(default_factory=list)
    open: list[Endpoint] = field(default_factory=list)
    queue: FairQueue = field(default_factory=FairQueue)
    output_share: float = 1.0  # generated tokens over max_tokens, smoothed
    outputs_seen: int = 0
    _made: float = 0.0
    _allowed: float = 0.0
    prefixes: PrefixIndex[Endpoint] = field(default_factory=PrefixIndex)
    seeds: npt.NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))  # of replicas, in their order
    adapters: dict[str, list[Endpoint]] = field(default_factory=dict)  # replicas by adapter that they state
    has_wards: bool = False  # a replica may be a ward, see quarantine
    measured_tokens_per_s: float = 0.0  # decode capacity of what serves; 0: not measured yet
    rates_by_kind: dict[str, tuple[Rates, int]] = field(default_factory=dict)  # by device kind, and its full batch
    max_model_len: int = 0  # the longest context of a replica
    vocab_size: int = 0  # the smallest; 0: none states one
    measures: ModelMeasures = field(default_factory=ModelMeasures)

    def expected_output(self, max_tokens: int) -> int:
        if self.outputs_seen < 8:
            return max_tokens
        return max(1, round(self.output_share * max_tokens))

    def saw_output(self, tokens: int, max_tokens: int) -> None:
        """A request ended by itself. Long allowances weigh more, so that sums of expectations come out right."""
        self.outputs_seen += 1
        self._made += (tokens - self._made) * max(1 / self.outputs_seen, 1 / 256)
        self._allowed += (max(max_tokens, tokens, 1) - self._allowed) * max(1 / self.outputs_seen, 1 / 256)
        self.output_share = self._made / self._allowed

    def work_s(self, prompt_tokens: int, tokens: int) -> float:
        """A request's part of a replica's full time, on the kind that takes least; 0 until one was measured."""
        kinds = self.rates_by_kind.values()
        return min((rates.work_s(prompt_tokens, tokens, batch) for rates, batch in kinds), default=0.0)

    def arrived(self, prompt_tokens: int, tokens: int, choices: int) -> None:
        """A request that could be served has come, whether or not it may enter."""
        self.measures.arrived += choices
        self.measures.arrived_work_s += choices * self.work_s(prompt_tokens, tokens)

    def gauge(self) -> None:
        """Sums up what its replicas were measured at. Called ten times a second, so that a request need not."""
        serving = [r.capacity for r in self.replicas if r.connected and not r.draining]
        measured = any(capacity.measured for capacity in serving)
        self.measured_tokens_per_s = sum(c.decode_tokens_per_s for c in serving) if measured else 0.0


class EndpointTable:
    """The table. `replicas[index]` is None once a replica is gone and has no slot left; indexes are then reused."""

    def __init__(self, admission: AdmissionConfig, breaker: BreakerConfig) -> None:
        self._admission = admission
        self._breaker = breaker
        self.replicas: list[Endpoint | None] = []
        self.by_name: dict[tuple[str, int], Endpoint] = {}
        self.pools: dict[str, Pool] = {}
        self.epoch = 0
        self.version = 0
        self.told = True  # False while a controller that is to say what there is has not yet

    def live(self) -> list[Endpoint]:
        return [replica for replica in self.replicas if replica is not None]

    def add_pool(self, model: str, policy: Policy) -> Pool:
        pool = Pool(model, policy)
        self.pools[model] = pool
        return pool

    def add(self, member: Member, pool: Pool) -> Endpoint:
        batch = member.max_running or self._admission.replica_requests
        capacity = Capacity(batch)
        known = pool.rates_by_kind.get(member.device_kind)
        if known is not None:
            capacity.adopt(known[0])
        limit = max(1, round(batch * self._admission.replica_slack))
        index = next((i for i, r in enumerate(self.replicas) if r is None), len(self.replicas))
        circuit = Circuit(self._breaker.failures, self._breaker.open_s, self._breaker.max_open_s)
        replica = Endpoint(index, member, pool, circuit, capacity, limit)
        replica.draining = member.draining
        if index == len(self.replicas):
            self.replicas.append(replica)
        else:
            self.replicas[index] = replica
        self.by_name[member.replica, member.incarnation] = replica
        pool.replicas.append(replica)
        index_members(pool)
        return replica

    def remove(self, replica: Endpoint) -> None:
        """The replica is no longer a member. Its index stays taken until `release`."""
        replica.gone = True
        self._close(replica)
        self.by_name.pop((replica.name, replica.member.incarnation), None)
        if replica in replica.pool.replicas:
            replica.pool.replicas.remove(replica)
            index_members(replica.pool)

    def release(self, replica: Endpoint) -> None:
        self.replicas[replica.index] = None

    def refresh(self, replica: Endpoint, now: float) -> None:
        """Puts the replica into or out of its pool's open list; call after every change that may matter."""
        usable = (
            replica.connected
            and not replica.gone
            and not replica.draining
            and not replica.ward
            and replica.has_room()
            and now >= replica.ejected_until_s
            and replica.circuit.closed
        )
        if usable and replica.open_at < 0:
            replica.open_at = len(replica.pool.open)
            replica.pool.open.append(replica)
        elif not usable and replica.open_at >= 0:
            self._close(replica)

    def _close(self, replica: Endpoint) -> None:
        if replica.open_at < 0:
            return
        places = replica.pool.open
        last = places.pop()
        if last is not replica:
            places[replica.open_at] = last
            last.open_at = replica.open_at
        replica.open_at = -1


def index_members(pool: Pool) -> None:
    """Called when the members of a pool, or what they state, change."""
    pool.seeds = np.array([seed_of(r.name) for r in pool.replicas], np.uint64)
    pool.max_model_len = max((r.member.max_model_len for r in pool.replicas), default=0)
    pool.vocab_size = min((r.member.vocab_size for r in pool.replicas if r.member.vocab_size), default=0)
    pool.adapters.clear()
    for replica in pool.replicas:
        for name in replica.member.loras:
            pool.adapters.setdefault(name, []).append(replica)
