"""least_tokens (the default): of two replicas taken at random, the one that would be done sooner.

Score: seconds of outstanding work (prompt tokens not yet prefilled over measured prefill rate, expected remaining
tokens over measured decode capacity), this request included. Outstanding tokens are the router's own count, moved at
dispatch and with every frame, so a burst is spread at once; and capacity is measured, so an older device gets its
share and no more. Two choices bring the maximum load from log n down to log log n (Mitzenmacher 2001).
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatoken.router.fleet.fleet import Pool, Replica
    from megatoken.router.policies import Question


def score(replica: Replica, question: Question) -> float:
    """Seconds until the replica would be through with what it has and this request; lower is better."""
    capacity = replica.capacity
    return (replica.decode_outstanding + question.expected_tokens) / capacity.decode_tokens_per_s + (
        replica.prompt_outstanding + question.prompt_tokens
    ) / capacity.prefill_tokens_per_s


def two_choices(places: list[Replica], question: Question, rng: random.Random) -> Replica | None:
    """Two at random, avoiding those that lost the request before where there are others."""
    n = len(places)
    if n == 0:
        return None
    if n == 1:
        return places[0]
    first = int(rng.random() * n)
    second = int(rng.random() * (n - 1))
    if second >= first:
        second += 1
    a, b = places[first], places[second]
    if question.avoid:
        if a.index in question.avoid and b.index not in question.avoid:
            return b
        if b.index in question.avoid and a.index not in question.avoid:
            return a
        if a.index in question.avoid:
            others = [replica for replica in places if replica.index not in question.avoid]
            return two_choices(others, question, rng) if others else a
    return a if score(a, question) <= score(b, question) else b


class LeastTokens:
    name = "least_tokens"
    wants_prefix = False

    def choose(self, pool: Pool, question: Question, rng: random.Random) -> Replica | None:
        return two_choices(pool.open, question, rng)
