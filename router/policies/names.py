"""Policies as a spec writes them: `least_tokens`, `round_robin`, or scorers with weights, `prefix + 0.5*site`. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

ALONE: Final = ("least_tokens", "round_robin")
SCORERS: Final = ("prefix", "affinity", "lora", "site")
ALLOWED: Final = f"{', '.join(ALONE)}, or any of {', '.join(SCORERS)} with + between, and weights: 2*prefix + site"
MOST_WEIGHT: Final = 1000.0
_TERM: Final = re.compile(r"\s*(?:(\d+(?:\.\d+)?)\s*\*\s*)?([a-z_]+)\s*")


def parse_policy(text: str) -> Mapping[str, float]:
    """Weights by scorer, in the order of SCORERS, or one of ALONE with 1. Raises ValueError, with what is allowed."""
    weights: dict[str, float] = {}
    for term in text.split("+"):
        found = _TERM.fullmatch(term)
        name, weight = (found[2], float(found[1] or 1)) if found is not None else (term.strip(), 1.0)
        if name not in (*ALONE, *SCORERS):
            raise ValueError(f"{text!r} is not allowed; {ALLOWED}")
        if name in weights:
            raise ValueError(f"{text!r} names {name} twice; {ALLOWED}")
        if not 0 < weight <= MOST_WEIGHT:
            raise ValueError(f"{text!r} is not allowed; a weight is above 0 and at most {MOST_WEIGHT:g}")
        weights[name] = weight
    if not weights.keys().isdisjoint(ALONE) and weights != {next(iter(weights)): 1.0}:
        raise ValueError(f"{text!r} is not allowed: {' and '.join(ALONE)} stand alone; {ALLOWED}")
    return {name: weights[name] for name in (*ALONE, *SCORERS) if name in weights}


def policy_text(weights: Mapping[str, float]) -> str:
    """The one way to write these weights."""
    return " + ".join(name if weight == 1 else f"{weight:g}*{name}" for name, weight in weights.items())
