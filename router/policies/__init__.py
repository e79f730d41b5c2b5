"""Choosing a replica: filter, score, pick.

Filtering by health and room is done before (`Pool.open`); a policy filters further where it must, scores what is
left, and picks one. Each is one small file. All take `rng`, none keeps a clock, and each costs the same with ten
replicas as with a thousand.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

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
    name: str
    wants_prefix: bool  # asks for Question.prefix_hashes

    def choose(self, pool: Pool, question: Question, rng: random.Random) -> Replica | None:
        """One of pool.open, or None when none of them will do."""


NAMES: Final = ("least_tokens", "round_robin", "prefix", "affinity", "lora", "site")


def make_policy(name: str) -> Policy:
    """A fresh policy. Raises ValueError with the names that exist."""
    from megatoken.router.policies import affinity, least_tokens, lora, prefix, round_robin, site

    kinds: dict[str, type] = {
        "least_tokens": least_tokens.LeastTokens,
        "round_robin": round_robin.RoundRobin,
        "prefix": prefix.Prefix,
        "affinity": affinity.Affinity,
        "lora": lora.Lora,
        "site": site.Site,
    }
    if name not in kinds:
        raise ValueError(f"policy: {name!r} is not allowed; one of {', '.join(NAMES)}")
    policy: Policy = kinds[name]()
    return policy
