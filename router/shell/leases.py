"""Look-aside: a client is told a replica and streams from its worker directly; the router keeps its place there.

A lease counts as a request of the replica (room, outstanding tokens) until it is released or its time is over. A
replica that drains gets no new lease and its leases are not renewed; one that is gone takes its leases along. The
worker itself refuses what comes after its own drain began, whoever sends it: that is the fence.

What a lease really used the worker reports, and only by that is its charge put right and the usual length of answers
learnt: a client may say what it likes. One that is released before its report gives up its place, and stays charged in
full until the report or its end.
"""

from __future__ import annotations

import heapq
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from megatoken.access.credentials import Credentials, replica_lease_key
from megatoken.access.lease import MAX_ID_CHARACTERS, LeaseTerms, lease_id, sign
from megatoken.errors import DrainingError, OverloadError, RequestError, UnavailableError
from megatoken.router.admission.admission import retry_after_s
from megatoken.router.admission.validation import pool_of
from megatoken.router.core.accounts import charge_lease, uncharge_lease
from megatoken.router.core.state import RouterState
from megatoken.router.fleet.fleet import Endpoint
from megatoken.router.fleet.routing_request import RoutingRequest
from megatoken.router.identity.callers import Caller
from megatoken.v1 import router_pb2, tokens_pb2

MAX_KEYS: Final = 8192  # of replicas, derived and kept

Signer = Callable[[LeaseTerms], str]


class LeaseSigner:
    """Signs as a router may: with the key of the replica that a lease is for, made of the router's own."""

    def __init__(self, credentials: Callable[[], Credentials]) -> None:
        self._credentials = credentials
        self._own = ""
        self._keys: dict[str, bytes] = {}

    def __call__(self, terms: LeaseTerms) -> str:
        """Raises UnavailableError while the credentials hold no key."""
        own = self._credentials().lease_keys
        if not own:
            raise UnavailableError("this router's credentials sign no leases")
        if own[0] != self._own or len(self._keys) >= MAX_KEYS:
            self._own, self._keys = own[0], {}
        key = self._keys.get(terms.replica)
        if key is None:
            key = self._keys[terms.replica] = bytes.fromhex(replica_lease_key(own[0], terms.replica))
        return sign(terms, key)


@dataclass(slots=True)
class Lease:
    replica: Endpoint
    caller: Caller
    tokens: int  # charged to the tenant
    prompt_tokens: int
    decode_tokens: int
    max_tokens: int
    until_s: float
    failed: bool = False  # as its client said


class IssuedLeases:
    """All leases in force, and counts of those that ended (for metrics). Without `signer` a lease is a random id."""

    def __init__(self, state: RouterState, signer: Signer | None = None, unix: Callable[[], float] = time.time) -> None:
        self._state, self._signer, self._unix = state, signer, unix
        self._live: dict[str, Lease] = {}
        self._owed: dict[str, Lease] = {}  # released, and not reported yet; oldest first
        self._ends: list[tuple[float, str]] = []  # a heap
        self.ended = {"released": 0, "expired": 0, "failed": 0}

    def __len__(self) -> int:
        return len(self._live)

    def assign(self, request: router_pb2.AssignRequest, caller: Caller, now: float) -> router_pb2.AssignResponse:
        """Leases a replica. Raises as a submitted request would."""
        state = self._state
        if state.draining:
            raise DrainingError("the router is draining; ask another")
        caller = state.callers.admit(caller, request.model)
        if len(request.request_id) > MAX_ID_CHARACTERS:
            raise RequestError("request_id", request.request_id, f"at most {MAX_ID_CHARACTERS} characters")
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
        most_tokens = request.max_tokens or (context and context - request.prompt_tokens) or 256
        expected = pool.expected_output(most_tokens)
        asked = RoutingRequest(
            request.prompt_tokens, expected, request.affinity, request.lora, request.site, tuple(request.prefix_hashes)
        )
        replica = pool.policy.choose(pool, asked, state.rng) if not pool.queue.length else None
        if replica is None:
            raise OverloadError(f"no replica of {pool.model!r} has room", retry_after_s(pool))
        ttl_s = state.config.leases.ttl_s
        member = replica.member
        terms = LeaseTerms(
            lease_id=secrets.token_urlsafe(12),
            replica=member.replica,
            incarnation=member.incarnation,
            request_id=request.request_id or secrets.token_hex(8),
            model=pool.model,
            prompt_tokens=request.prompt_tokens,
            max_tokens=most_tokens,
            until_s=int(self._unix() + ttl_s),
        )
        text = self._signer(terms) if self._signer is not None else terms.lease_id
        cost = request.prompt_tokens + expected
        state.callers.enter(caller, 1, cost, now)
        name = terms.lease_id
        self._live[name] = Lease(replica, caller, cost, request.prompt_tokens, expected, most_tokens, now + ttl_s)
        heapq.heappush(self._ends, (now + ttl_s, name))
        charge_lease(state, replica, request.prompt_tokens, expected, now)
        return router_pb2.AssignResponse(
            lease=text,
            replica=member.replica,
            address=member.address,
            incarnation=member.incarnation,
            ttl_ms=round(ttl_s * 1000),
            request_id=terms.request_id,
        )

    def release(self, text: str, failed: bool, now: float) -> None:
        """The client is done: the place is free again. One that is not known has ended already, which is no error."""
        name = lease_id(text)
        lease = self._vacate(name, now)
        if lease is None:
            return
        lease.failed = failed
        self.ended["failed" if failed else "released"] += 1
        self._owed[name] = lease
        if len(self._owed) > self._state.config.leases.max_leases:
            self._settle(self._owed.pop(next(iter(self._owed))), None)

    def report(self, replica: Endpoint, usage: tokens_pb2.LeaseUsage, now: float) -> None:
        """A replica says what a lease used: one of ours, or another router's, which is passed over."""
        name = usage.lease_id
        lease = self._live.get(name) or self._owed.get(name)
        if lease is None or lease.replica is not replica:
            return
        if self._owed.pop(name, None) is None:
            self._vacate(name, now)
            self.ended["released"] += 1
        self._settle(lease, usage.prompt_tokens + usage.generated_tokens)
        if not lease.failed:
            lease.replica.pool.saw_output(usage.generated_tokens, lease.max_tokens)

    def expire(self, now: float) -> None:
        """Ends what is over, and what a lost replica had. Called about once a second."""
        while self._ends and self._ends[0][0] <= now:
            self._expire(heapq.heappop(self._ends)[1], now)
        for leases in (self._live, self._owed):
            for name in [name for name, lease in leases.items() if lease.replica.gone]:
                self._expire(name, now)
        known = len(self._live) + len(self._owed)
        if len(self._ends) > 2 * known + 1024:  # those that were settled stay in the heap until then
            self._ends = [
                (lease.until_s, name) for leases in (self._live, self._owed) for name, lease in leases.items()
            ]
            heapq.heapify(self._ends)

    def _expire(self, name: str, now: float) -> None:
        """Nobody said what it used, so it stays charged as it was."""
        lease = self._owed.pop(name, None)
        if lease is None:
            lease = self._vacate(name, now)
            if lease is None:
                return
            self.ended["expired"] += 1
        self._settle(lease, None)

    def _vacate(self, name: str, now: float) -> Lease | None:
        """Gives up the lease's place; None when it has none."""
        lease = self._live.pop(name, None)
        if lease is None:
            return None
        uncharge_lease(self._state, lease.replica, lease.prompt_tokens, lease.decode_tokens, now)
        return lease

    def _settle(self, lease: Lease, used_tokens: int | None) -> None:
        self._state.callers.leave(lease.caller, lease.tokens, lease.tokens if used_tokens is None else used_tokens)
