"""What a policy is asked, and what it answers. Pure; the policies themselves lie in router/policies."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from megatoken.router.fleet.fleet import Pool, Replica


@dataclass(frozen=True, slots=True)
class Question:
    """What a policy may know of the request."""

    prompt_tokens: int
    expected_tokens: int
    affinity: str = ""
    lora: str = ""
    site: str = ""
    prefix_hashes: tuple[int, ...] = ()
    avoid: frozenset[int] = frozenset()  # indexes of replicas that lost it before


class Policy(Protocol):
    """Chooses replicas for one model's requests."""

    name: str  # as a spec writes it
    wants_prefix: bool  # asks for Question.prefix_hashes

    def choose(self, pool: Pool, question: Question, rng: random.Random) -> Replica | None:
        """One of pool.open, or None when there is none."""
