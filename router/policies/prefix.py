"""prefix: the replica that holds the longest prefix of the prompt, as long as it is not far behind.

Score: seconds of outstanding work, minus the prefill seconds that cached blocks save. The saving is bounded by the
prompt's own prefill time, so a popular prefix cannot pile up on one replica: once its queue costs more than the cache
saves, the next replica is cheaper, prefills the prefix once, and holds it too.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Final

from megatoken.router.fleet.prefix_book import cached_tokens
from megatoken.router.policies.least_tokens import score

if TYPE_CHECKING:
    from megatoken.router.fleet.fleet import Pool, Replica
    from megatoken.router.policies import Question

_HOLDERS: Final = 8  # replicas looked at that hold the prefix


def prefix_score(replica: Replica, question: Question) -> float:
    saved = min(cached_tokens(replica, question.prefix_hashes), question.prompt_tokens - 1)
    return score(replica, question) - saved / replica.capacity.prefill_tokens_per_s


class Prefix:
    name = "prefix"
    wants_prefix = True

    def choose(self, pool: Pool, question: Question, rng: random.Random) -> Replica | None:
        places = pool.open
        if not places:
            return None
        drawn = places
        if len(places) > _HOLDERS:
            drawn = rng.choices(places, k=2) + pool.prefixes.holders(question.prefix_hashes, _HOLDERS)
        fresh = [replica for replica in drawn if replica.index not in question.avoid] or drawn
        return min(fresh, key=lambda replica: prefix_score(replica, question))
