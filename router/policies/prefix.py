"""prefix: cached blocks of the prompt need no prefill. Saves the prefill seconds of what a replica holds.

The saving is bounded by the prompt's own prefill time, so a popular prefix cannot pile up on one replica: once its
queue costs more than the cache saves, the next replica is cheaper, prefills the prefix once, and holds it too.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Final

from megatoken.router.fleet.prefix_index import cached_tokens
from megatoken.router.fleet.routing_request import RoutingRequest
from megatoken.router.policies.joined import Scored

if TYPE_CHECKING:
    from megatoken.router.fleet.fleet import Endpoint, Pool

_HOLDERS: Final = 8  # replicas looked at that hold the prefix


class Prefix:
    wants_prefix = True

    def score(self, pool: Pool, asked: RoutingRequest, rng: random.Random) -> Scored | None:
        if not asked.prefix_hashes:
            return None

        def seconds(replica: Endpoint) -> float:
            saved = min(cached_tokens(replica, asked.prefix_hashes), asked.prompt_tokens - 1)
            return -saved / replica.capacity.prefill_tokens_per_s

        return Scored(pool.prefixes.holders(asked.prefix_hashes, _HOLDERS), seconds)
