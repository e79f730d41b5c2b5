"""site: nearest first. A replica costs the measured round trip to it, once, for the first token.

A client's own site (Question.site) counts as near: replicas there are given a head start of NEAR_S, since their tokens
do not cross sites twice.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Final

from megatoken.router.fleet.routing_request import RoutingRequest
from megatoken.router.policies.joined import Scored
from megatoken.router.policies.least_tokens import two_of

if TYPE_CHECKING:
    from megatoken.router.fleet.fleet import Endpoint, Pool

NEAR_S: Final = 0.02


class Site:
    wants_prefix = False

    def score(self, pool: Pool, asked: RoutingRequest, rng: random.Random) -> Scored | None:
        def seconds(replica: Endpoint) -> float:
            near = NEAR_S if asked.site and replica.member.site == asked.site else 0.0
            return replica.rtt_s - near

        return Scored(two_of(pool.open, rng), seconds)  # of four one is near more often than of two
