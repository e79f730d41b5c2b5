"""Scorers joined to one policy: what each wants looked at is drawn, and the least sum of seconds is picked.

A scorer says what a replica costs or saves this request beside the work that it has: seconds of prefill that cached
blocks save, a round trip, the wait that a move is worth. Seconds add up, so scorers need not know of each other, and a
weight says how much one counts. Two at random are always drawn as well, so that what all prefer cannot pile up: past
what the scorers save, work decides.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from megatoken.router.fleet.routing_request import RoutingRequest
from megatoken.router.policies.least_tokens import not_avoided, two_of, work_s

if TYPE_CHECKING:
    from megatoken.router.fleet.fleet import Endpoint, Pool

FEW: Final = 4  # replicas: so few are all looked at


class Scored(NamedTuple):
    """What a scorer says of one request."""

    worth_a_look: Sequence[Endpoint]
    seconds: Callable[[Endpoint], float]  # that a replica costs this request; below 0: saves


class Scorer(Protocol):
    wants_prefix: bool

    def score(self, pool: Pool, asked: RoutingRequest, rng: random.Random) -> Scored | None:
        """None: this request is all the same to it."""


class Joined:
    """Scorers with their weights."""

    def __init__(self, name: str, scorers: Sequence[tuple[float, Scorer]]) -> None:
        self.name = name
        self.wants_prefix = any(scorer.wants_prefix for _, scorer in scorers)
        self._scorers = scorers

    def choose(self, pool: Pool, asked: RoutingRequest, rng: random.Random) -> Endpoint | None:
        places = pool.open
        if not places:
            return None
        if len(places) <= FEW:
            first = int(rng.random() * len(places))  # of equals the first is picked: that must not always be the same
            drawn = places[first:] + places[:first]
        else:
            drawn = list(two_of(not_avoided(places, asked), rng))
        terms: list[tuple[float, Callable[[Endpoint], float]]] = []
        for weight, scorer in self._scorers:
            scored = scorer.score(pool, asked, rng)
            if scored is not None:
                drawn += scored.worth_a_look
                terms.append((weight, scored.seconds))

        def total_s(replica: Endpoint) -> float:
            return work_s(replica, asked) + sum(weight * seconds(replica) for weight, seconds in terms)

        return min(not_avoided(drawn, asked), key=total_s)
