"""Look-aside: a client is told a replica and streams from its worker directly; the router keeps its place there.

A lease counts as a request of the replica (room, outstanding tokens) until it is released or its time is over. A
replica that drains gets no new lease and its leases are not renewed; one that is gone takes its leases along. The
worker itself refuses what comes after its own drain began, whoever sends it: that is the fence.
"""

from __future__ import annotations

import heapq
import secrets
from dataclasses import dataclass

from megatoken.errors import OverloadError, RequestError, UnavailableError
from megatoken.v1 import router_pb2
from router.admission import retry_after_s
from router.door import Caller
from router.fleet import Replica
from router.policies import Question
from router.state import RouterState
from router.validation import pool_of
from router.wire import DRAINING


@dataclass(slots=True)
class Lease:
    replica: Replica
    caller: Caller
    tokens: int  # charged to the tenant
    prompt_tokens: int
    decode_tokens: int
    max_tokens: int
    until_s: float


class Leases:
    """All leases in force, and counts of those that ended (for metrics)."""

    def __init__(self, state: RouterState) -> None:
        self._state = state
        self._live: dict[str, Lease] = {}
        self._ends: list[tuple[float, str]] = []  # a heap
        self.ended = {"released": 0, "expired": 0, "failed": 0}

    def __len__(self) -> int:
        return len(self._live)

    def assign(self, request: router_pb2.AssignRequest, caller: Caller, now: float) -> router_pb2.AssignResponse:
        """Leases a replica. Raises as a submitted request would."""
        state = self._state
        if state.draining:
            raise UnavailableError(DRAINING)
        caller = state.door.admit(caller, request.model)
        pool = pool_of(state.fleet, request.model)
        context = pool.max_model_len
        if context and request.prompt_tokens + max(1, request.max_tokens) > context:
            wanted = request.prompt_tokens + request.max_tokens
            raise RequestError("max_tokens", wanted, f"prompt and answer together at most {context} tokens")
        most = state.config.leases.max_leases
        if len(self._live) >= most:
            raise OverloadError(f"{most} leases are in force, as many as may be", 1.0)
        if not pool.replicas:
            raise UnavailableError(f"model: {pool.model!r} has no replica now")
        most_tokens = request.max_tokens or context or 256
        expected = pool.expected_output(most_tokens)
        question = Question(
            request.prompt_tokens, expected, request.affinity, request.lora, request.site, tuple(request.prefix_hashes)
        )
        replica = pool.policy.choose(pool, question, state.rng) if not pool.queue.length else None
        if replica is None:
            raise OverloadError(f"no replica of {pool.model!r} has room", retry_after_s(pool))
        cost = request.prompt_tokens + expected
        state.door.enter(caller, 1, cost, now)
        ttl_s = state.config.leases.ttl_s
        name = secrets.token_urlsafe(12)
        self._live[name] = Lease(replica, caller, cost, request.prompt_tokens, expected, most_tokens, now + ttl_s)
        heapq.heappush(self._ends, (now + ttl_s, name))
        replica.leased += 1
        replica.prompt_outstanding += request.prompt_tokens
        replica.decode_outstanding += expected
        state.fleet.refresh(replica, now)
        member = replica.member
        return router_pb2.AssignResponse(
            lease=name,
            replica=member.replica,
            address=member.address,
            incarnation=member.incarnation,
            ttl_ms=round(ttl_s * 1000),
        )

    def release(self, name: str, generated_tokens: int, failed: bool, now: float) -> None:
        """The client is done. A lease that is not known has ended already: that is no error."""
        lease = self._live.get(name)
        if lease is None:
            return
        self._end(name, generated_tokens, now)
        self.ended["failed" if failed else "released"] += 1
        if not failed:
            lease.replica.pool.saw_output(generated_tokens, lease.max_tokens)

    def expire(self, now: float) -> None:
        """Ends what is over, and what a lost replica had. Called about once a second."""
        while self._ends and self._ends[0][0] <= now:
            _, name = heapq.heappop(self._ends)
            if name in self._live:
                self._end(name, 0, now)
                self.ended["expired"] += 1
        for name in [name for name, lease in self._live.items() if lease.replica.gone]:
            self._end(name, 0, now)
            self.ended["expired"] += 1
        if len(self._ends) > 2 * len(self._live) + 1024:  # released ones stay in the heap until then
            self._ends = [(lease.until_s, name) for name, lease in self._live.items()]
            heapq.heapify(self._ends)

    def _end(self, name: str, generated_tokens: int, now: float) -> None:
        lease = self._live.pop(name)
        replica = lease.replica
        replica.leased -= 1
        replica.prompt_outstanding -= lease.prompt_tokens
        replica.decode_outstanding -= lease.decode_tokens
        self._state.door.leave(lease.caller, lease.tokens, lease.prompt_tokens + generated_tokens)
        self._state.fleet.refresh(replica, now)
