"""site: nearest first. Two choices on outstanding work plus the measured round trip to the replica.

The round trip counts once for the first token. A client's own site (Question.site) counts as near: replicas there
are given a head start of NEAR_S, since their tokens do not cross sites twice.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Final

from megatoken.router.policies.least_tokens import score

if TYPE_CHECKING:
    from megatoken.router.fleet.fleet import Pool, Replica
    from megatoken.router.policies import Question

NEAR_S: Final = 0.02
_DRAWS: Final = 4


def site_score(replica: Replica, question: Question) -> float:
    near = NEAR_S if question.site and replica.member.site == question.site else 0.0
    return score(replica, question) + replica.rtt_s - near


class Site:
    name = "site"
    wants_prefix = False

    def choose(self, pool: Pool, question: Question, rng: random.Random) -> Replica | None:
        places = pool.open
        if not places:
            return None
        drawn = places if len(places) <= _DRAWS else rng.choices(places, k=_DRAWS)
        fresh = [replica for replica in drawn if replica.index not in question.avoid] or drawn
        return min(fresh, key=lambda replica: site_score(replica, question))
