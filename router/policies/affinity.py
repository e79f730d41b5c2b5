"""affinity: requests with the same affinity key go to the same replica while it has room and is not far behind.

Rendezvous hashing over a few draws: the key seeds a sequence of candidates, so that keys keep their replica when
others come and go, and the cost is the same for any number of replicas. A replica more than SPILL_S seconds of work
behind a random other one gives the request to the less loaded (bounded imbalance). No key: least_tokens.
"""

from __future__ import annotations

import random
import zlib
from typing import TYPE_CHECKING, Final

from router.policies.least_tokens import score, two_choices

if TYPE_CHECKING:
    from router.fleet import Pool, Replica
    from router.policies import Question

SPILL_S: Final = 2.0
_PROBES: Final = 8


def home(pool: Pool, key: str) -> Replica | None:
    """The replica of a key. Stable: picks by hash among all members, probing on while a draw may not serve."""
    members = pool.replicas
    if not members:
        return None
    for probe in range(_PROBES):
        replica = members[zlib.crc32(f"{probe}:{key}".encode()) % len(members)]
        if replica.open_at >= 0:
            return replica
    return None


class Affinity:
    name = "affinity"
    wants_prefix = False

    def choose(self, pool: Pool, question: Question, rng: random.Random) -> Replica | None:
        other = two_choices(pool.open, question, rng)
        if not question.affinity or other is None:
            return other
        kept = home(pool, question.affinity)
        if kept is None or kept.index in question.avoid:
            return other
        return kept if score(kept, question) <= score(other, question) + SPILL_S else other
