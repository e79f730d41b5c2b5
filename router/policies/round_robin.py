"""round_robin: the open replicas in turn. Load and speed play no part; for comparison, and for equal short requests."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from megatoken.router.fleet.routing_request import RoutingRequest

if TYPE_CHECKING:
    from megatoken.router.fleet.fleet import Endpoint, Pool


class RoundRobin:
    name = "round_robin"
    wants_prefix = False

    def __init__(self) -> None:
        self._turn = 0

    def choose(self, pool: Pool, asked: RoutingRequest, rng: random.Random) -> Endpoint | None:
        places = pool.open
        for _ in range(min(len(places), len(asked.avoid) + 1)):
            self._turn += 1
            replica = places[self._turn % len(places)]
            if replica.index not in asked.avoid:
                return replica
        return places[self._turn % len(places)] if places else None
