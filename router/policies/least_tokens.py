"""least_tokens (the default): of two replicas taken at random, the one that would be done sooner.

Score: seconds of outstanding work (prompt tokens not yet prefilled over measured prefill rate, expected remaining
tokens over measured decode capacity), this request included. Outstanding tokens are the router's own count, moved at
dispatch and with every frame, so a burst is spread at once; and capacity is measured, so an older device gets its
share and no more. Two choices bring the maximum load from log n down to log log n (Mitzenmacher 2001).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatoken.router.fleet.routing_request import RoutingRequest

if TYPE_CHECKING:
    from megatoken.router.fleet.fleet import Endpoint, Pool


def work_s(replica: Endpoint, asked: RoutingRequest) -> float:
    """Seconds until the replica would be through with what it has and this request; lower is better."""
    capacity = replica.capacity
    return (replica.decode_outstanding + asked.expected_tokens) / capacity.decode_tokens_per_s + (
        replica.prompt_outstanding + asked.prompt_tokens
    ) / capacity.prefill_tokens_per_s


def not_avoided(places: Sequence[Endpoint], asked: RoutingRequest) -> Sequence[Endpoint]:
    """Those that have not lost the request before, where there are any."""
    if not asked.avoid:
        return places
    return [replica for replica in places if replica.index not in asked.avoid] or places


def two_of(places: Sequence[Endpoint], rng: random.Random) -> Sequence[Endpoint]:
    """Two different ones at random; all where there are no more."""
    n = len(places)
    if n <= 2:
        return places
    first = int(rng.random() * n)
    second = int(rng.random() * (n - 1))
    return places[first], places[second + (second >= first)]


class LeastTokens:
    name = "least_tokens"
    wants_prefix = False

    def choose(self, pool: Pool, asked: RoutingRequest, rng: random.Random) -> Endpoint | None:
        drawn = two_of(not_avoided(pool.open, asked), rng)
        if len(drawn) < 2:
            return drawn[0] if drawn else None
        a, b = drawn
        return a if work_s(a, asked) <= work_s(b, asked) else b
