"""lora: prefers replicas that state the request's adapter; among them, two choices on outstanding work."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Final

from router.policies.least_tokens import score, two_choices

if TYPE_CHECKING:
    from router.fleet import Pool, Replica
    from router.policies import Question

_DRAWS: Final = 16
SPILL_S: Final = 2.0  # loading an adapter elsewhere is worth it past this much more waiting


class Lora:
    name = "lora"
    wants_prefix = False

    def choose(self, pool: Pool, question: Question, rng: random.Random) -> Replica | None:
        places = pool.open
        other = two_choices(places, question, rng)
        if not question.lora or other is None:
            return other
        drawn = places if len(places) <= _DRAWS else rng.sample(places, _DRAWS)
        having = [replica for replica in drawn if question.lora in replica.member.loras]
        best = two_choices(having, question, rng)
        if best is None:
            return other
        return best if score(best, question) <= score(other, question) + SPILL_S else other
