"""Makes policies from their text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from megatoken.router.fleet.fleet import Policy
from megatoken.router.policies.affinity import Affinity
from megatoken.router.policies.joined import Joined, Scorer
from megatoken.router.policies.least_tokens import LeastTokens
from megatoken.router.policies.lora import Lora
from megatoken.router.policies.names import parse_policy, policy_text
from megatoken.router.policies.prefix import Prefix
from megatoken.router.policies.round_robin import RoundRobin
from megatoken.router.policies.site import Site

KINDS: Final[Mapping[str, type[Scorer]]] = {"prefix": Prefix, "affinity": Affinity, "lora": Lora, "site": Site}


def make_policy(text: str) -> Policy:
    """A fresh policy. Raises ValueError that names the value and what is allowed."""
    try:
        weights = parse_policy(text)
    except ValueError as error:
        raise ValueError(f"policy: {error}") from None
    if "least_tokens" in weights:
        return LeastTokens()
    if "round_robin" in weights:
        return RoundRobin()
    return Joined(policy_text(weights), [(weight, KINDS[name]()) for name, weight in weights.items()])
