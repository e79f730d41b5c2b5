"""Which requests may come straight from clients: those with a lease that a router signed for this replica.

One lease is for one request: it is taken when that request starts, and remembered until its end, so that nobody uses
it twice. A request that is refused has not used its lease. What leased requests really used is told to every router
session, since a worker does not know which router signed; the others pass over it. Used by replica.py on its loop.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from megatoken.access.credentials import Credentials
from megatoken.access.lease import LeaseTerms, lease_id, verify
from megatoken.errors import ForbiddenError, OverloadError, RequestError
from megatoken.v1 import frame_columns_pb2 as columns

MAX_REMEMBERED: Final = 1 << 18  # leases used and not over; some 30 MB
FULL_RETRY_S: Final = 10.0


class LeaseChecks(Protocol):
    """What a caller's requests are asked for."""

    def check(self, request: columns.GenerateRequest, prompt_tokens: int, room: int) -> LeaseTerms | None:
        """The terms of the request's lease; raises MegatokenError for one that may not run."""

    def take(self, terms: LeaseTerms) -> None:
        """Its request starts."""

    def left_s(self, terms: LeaseTerms) -> float | None:
        """Until the lease is over; None: nobody knows here."""


class UncheckedLeases:
    """Of a worker that lets everybody in who reaches it: a lease is no more than the name to report its use by."""

    def check(self, request: columns.GenerateRequest, _prompt_tokens: int, _room: int) -> LeaseTerms | None:
        """Whatever the request says."""
        if not request.lease:
            return None
        return LeaseTerms(lease_id(request.lease), "", 0, request.request_id, request.model, 0, 0, 0)

    def take(self, terms: LeaseTerms) -> None:
        """As often as one likes."""

    def left_s(self, terms: LeaseTerms) -> float | None:
        """Only the router knows its end."""
        return None


class LeaseTable:
    """Of a worker with a gate: the leases of its replica that were used and are not over."""

    def __init__(
        self,
        replica: str,
        incarnation: int,
        credentials: Callable[[], Credentials],
        clock: Callable[[], float] = time.time,
        most: int = MAX_REMEMBERED,
    ) -> None:
        self._replica, self._incarnation, self._credentials, self._most = replica, incarnation, credentials, most
        self._clock = clock  # unix, as a lease's end
        self._used: set[str] = set()
        self._ends: list[tuple[int, str]] = []  # a heap
        self._texts: tuple[str, ...] = ()
        self._keys: list[bytes] = []

    def __len__(self) -> int:
        return len(self._used)

    def check(self, request: columns.GenerateRequest, prompt_tokens: int, room: int) -> LeaseTerms:
        """The terms of the request's lease; `room` is what the context leaves for the answer.

        A request that names no max_tokens gets as many as the lease allows. Raises AuthError or ForbiddenError.
        """
        now_s = self._clock()
        terms = verify(
            request.lease,
            self._verifying(),
            replica=self._replica,
            incarnation=self._incarnation,
            request_id=request.request_id,
            now_s=now_s,
        )
        if terms.lease_id in self._used:
            raise ForbiddenError("lease: it was used already; each request needs its own")
        if request.priority < 0:  # its key was not asked: who goes before others is the router's to say
            raise RequestError("priority", request.priority, "0 or more with a lease")
        self._forget(now_s)
        if len(self._used) >= self._most:
            raise OverloadError(
                f"replica {self._replica} has {self._most} leases in use, the most it may", FULL_RETRY_S
            )
        _check_size(request, terms, prompt_tokens, room)
        return terms

    def take(self, terms: LeaseTerms) -> None:
        """Its request starts: the lease is good for no other."""
        self._used.add(terms.lease_id)
        heapq.heappush(self._ends, (terms.until_s, terms.lease_id))

    def left_s(self, terms: LeaseTerms) -> float | None:
        """Until the lease is over."""
        return max(0.0, terms.until_s - self._clock())

    def _verifying(self) -> Sequence[bytes]:
        texts = self._credentials().lease_keys
        if texts != self._texts:
            self._texts, self._keys = texts, [bytes.fromhex(text) for text in texts]
        return self._keys

    def _forget(self, now_s: float) -> None:
        """What is over is refused for that, so nobody needs to know that it was used."""
        while self._ends and self._ends[0][0] <= now_s:
            self._used.discard(heapq.heappop(self._ends)[1])


def _check_size(request: columns.GenerateRequest, terms: LeaseTerms, prompt_tokens: int, room: int) -> None:
    sampling = request.sampling
    choices = max(1, sampling.n)
    if prompt_tokens > terms.prompt_tokens:
        raise ForbiddenError(f"prompt: {prompt_tokens} tokens, and the lease allows {terms.prompt_tokens}")
    if not sampling.HasField("max_tokens"):
        sampling.max_tokens = max(1, min(terms.max_tokens // choices, room))
    if sampling.max_tokens * choices > terms.max_tokens:
        raise ForbiddenError(
            f"sampling.max_tokens: {sampling.max_tokens} for each of {choices}, and the lease allows {terms.max_tokens}"
        )
