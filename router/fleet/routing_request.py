"""What a policy is asked. Pure; the policies themselves lie in router/policies."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RoutingRequest:
    """What a policy may know of the request."""

    prompt_tokens: int
    expected_tokens: int
    affinity: str = ""
    lora: str = ""
    site: str = ""
    prefix_hashes: tuple[int, ...] = ()
    avoid: frozenset[int] = frozenset()  # indexes of replicas that lost it before
