"""lora: prefers replicas that state the request's adapter; among them, two choices on outstanding work."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Final

from megatoken.router.policies.least_tokens import score, two_choices

if TYPE_CHECKING:
    from megatoken.router.fleet.fleet import Pool, Replica
    from megatoken.router.policies import Question

_DRAWS: Final = 4
SPILL_S: Final = 2.0  # loading an adapter elsewhere is worth it past this much more waiting


class Lora:
    name = "lora"
    wants_prefix = False

    def choose(self, pool: Pool, question: Question, rng: random.Random) -> Replica | None:
        places = pool.open
        other = two_choices(places, question, rng)
        if not question.lora or other is None:
            return other
        having = pool.adapters.get(question.lora, ())
        drawn = having if len(having) <= _DRAWS else rng.choices(having, k=_DRAWS)
        best = two_choices([replica for replica in drawn if replica.open_at >= 0], question, rng)
        if best is None:
            return other
        return best if score(best, question) <= score(other, question) + SPILL_S else other
