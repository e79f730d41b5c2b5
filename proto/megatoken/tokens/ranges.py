"""What each sampling field may be, for everybody who takes requests: the ranges that tokens.proto states, once.

The router and the worker both check, since clients may reach either. What depends on a model (its vocabulary, its
context) is checked where that is known.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from megatoken.errors import RequestError
from megatoken.v1.tokens_pb2 import SamplingParams

MAX_CHOICES: Final = 128  # OpenAI's own limit on n
MAX_SEED: Final = 2**63 - 1  # int64


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers from `lowest` (or, `above` it) to `highest`. Neither NaN nor an infinity is ever in it."""

    lowest: float
    highest: float = math.inf
    above: bool = False
    meaning: str = ""  # of the lowest, where it is not just the smallest

    def holds(self, value: float) -> bool:
        return (
            math.isfinite(value)
            and (self.lowest < value if self.above else self.lowest <= value)
            and (value <= self.highest)
        )

    def __str__(self) -> str:
        if self.highest == math.inf:
            return f"{'above' if self.above else 'at least'} {self.lowest:g}{self.meaning}"
        if self.above:
            return f"above {self.lowest:g} and at most {self.highest:g}"
        return f"{self.lowest:g} to {self.highest:g}"


RANGES: Final[dict[str, Range]] = {
    "temperature": Range(0.0),
    "top_p": Range(0.0, 1.0, above=True),
    "min_p": Range(0.0, 1.0),
    "top_k": Range(-1, meaning=", which like 0 means all tokens"),
    "presence_penalty": Range(-2.0, 2.0),
    "frequency_penalty": Range(-2.0, 2.0),
    "repetition_penalty": Range(0.0, above=True),
    "n": Range(1, MAX_CHOICES),
    "max_tokens": Range(1),
    "logprobs": Range(-1, meaning=", which means the whole vocabulary"),
    "prompt_logprobs": Range(-1, meaning=", which means the whole vocabulary"),
}
LOGIT_BIAS: Final = Range(-100.0, 100.0)


def check_ranges(sampling: SamplingParams, most_choices: int = MAX_CHOICES) -> None:
    """Raises RequestError for the first field out of its range. `most_choices`: of n, where less than MAX_CHOICES."""
    for field, value in sampling.ListFields():
        allowed = RANGES.get(field.name)
        if allowed is not None and not allowed.holds(value):
            shown = round(value, 6) if isinstance(value, float) else value
            raise RequestError(f"sampling.{field.name}", shown, str(allowed))
    if sampling.n > most_choices:
        raise RequestError("sampling.n", sampling.n, str(Range(1, most_choices)))
    choices = max(1, sampling.n)
    if sampling.seed > MAX_SEED + 1 - choices:  # choice i gets seed + i
        raise RequestError("sampling.seed", sampling.seed, f"at most {MAX_SEED + 1 - choices} with n = {choices}")
    for token, bias in sampling.logit_bias.items():
        if not LOGIT_BIAS.holds(bias):
            raise RequestError(f"sampling.logit_bias[{token}]", bias, str(LOGIT_BIAS))
