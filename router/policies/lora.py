"""lora: a replica that does not state the request's adapter would have to load it first."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Final

from megatoken.router.fleet.routing_request import RoutingRequest
from megatoken.router.policies.joined import FEW, Scored
from megatoken.router.policies.least_tokens import two_of

if TYPE_CHECKING:
    from megatoken.router.fleet.fleet import Pool

LOAD_S: Final = 2.0  # loading an adapter elsewhere is worth it past this much more waiting


class Lora:
    wants_prefix = False

    def score(self, pool: Pool, asked: RoutingRequest, rng: random.Random) -> Scored | None:
        if not asked.lora:
            return None
        having = pool.adapters.get(asked.lora, ())
        drawn = having if len(having) <= FEW else two_of(having, rng)
        able = [replica for replica in drawn if replica.open_at >= 0]
        return Scored(able, lambda replica: 0.0 if asked.lora in replica.member.loras else LOAD_S)
