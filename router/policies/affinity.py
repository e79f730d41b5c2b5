"""affinity: requests with the same key go to the same replica: to go elsewhere must be worth SPILL_S seconds of work.

Rendezvous hashing (highest random weight, Thaler and Ravishankar 1998): each replica's weight for a key is a hash of
both, and the heaviest that may serve has the key. So a replica that joins n others takes 1 / (n + 1) of the keys and
moves no other, and one that leaves gives each of its keys to the next heaviest. Names count, not incarnations. The
bound on what a move is worth bounds the imbalance.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from megatoken.router.fleet.affinity_seeds import seed_of
from megatoken.router.fleet.routing_request import RoutingRequest
from megatoken.router.policies.joined import Scored

if TYPE_CHECKING:
    from megatoken.router.fleet.fleet import Endpoint, Pool

SPILL_S: Final = 2.0


def home(pool: Pool, key: str) -> Endpoint | None:
    """The replica of a key: of those that may serve, the one of the highest weight."""
    members = pool.replicas
    if not members or not pool.open:
        return None
    weights = _mixed(pool.seeds ^ seed_of(key))
    heaviest = members[int(weights.argmax())]
    if heaviest.open_at >= 0:
        return heaviest
    return next(members[at] for at in np.argsort(weights)[::-1].tolist() if members[at].open_at >= 0)


def _mixed(words: Any) -> Any:
    """The finaliser of MurmurHash3: every bit of a word depends on all of them."""
    words = (words ^ (words >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    words = (words ^ (words >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return words ^ (words >> np.uint64(33))


class Affinity:
    wants_prefix = False

    def score(self, pool: Pool, asked: RoutingRequest, rng: random.Random) -> Scored | None:
        kept = home(pool, asked.affinity) if asked.affinity else None
        if kept is None:
            return None
        return Scored((kept,), lambda replica: 0.0 if replica is kept else SPILL_S)
