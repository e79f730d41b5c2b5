"""Both validators refuse by one table; each boundary of it is tried from both sides."""

from __future__ import annotations

import math
from typing import Any

import pytest

from megatoken.errors import RequestError
from megatoken.tokens.ranges import MAX_SEED, RANGES, check_ranges
from megatoken.v1.tokens_pb2 import SamplingParams

TINY = 1e-6  # more than a float32's rounding at 2
IN = {
    "temperature": [0.0, 5.0],
    "top_p": [TINY, 1.0],
    "min_p": [0.0, 1.0],
    "top_k": [-1, 0, 1, 2**31 - 1],
    "presence_penalty": [-2.0, 2.0],
    "frequency_penalty": [-2.0, 2.0],
    "repetition_penalty": [TINY, 1000.0],
    "n": [1, 128],
    "max_tokens": [1, 2**32 - 1],
    "logprobs": [-1, 0, 20],
    "prompt_logprobs": [-1, 0, 20],
}
OUT = {
    "temperature": [-TINY, math.inf, math.nan],
    "top_p": [0.0, 1.0 + TINY, math.nan],
    "min_p": [-TINY, 1.0 + TINY, math.nan],
    "top_k": [-2],
    "presence_penalty": [-2.0 - TINY, 2.0 + TINY, math.nan],
    "frequency_penalty": [-2.0 - TINY, 2.0 + TINY, -math.inf],
    "repetition_penalty": [0.0, -1.0, math.inf, math.nan],
    "n": [0, 129],
    "max_tokens": [0],
    "logprobs": [-2],
    "prompt_logprobs": [-2],
}
MESSAGES = [
    ({"temperature": -1}, "sampling.temperature: -1.0 is not allowed; at least 0"),
    ({"top_p": 0}, "sampling.top_p: 0.0 is not allowed; above 0 and at most 1"),
    ({"min_p": 2}, "sampling.min_p: 2.0 is not allowed; 0 to 1"),
    ({"top_k": -5}, "sampling.top_k: -5 is not allowed; at least -1, which like 0 means all tokens"),
    ({"n": 0}, "sampling.n: 0 is not allowed; 1 to 128"),
    ({"logit_bias": {7: 101}}, "sampling.logit_bias[7]: 101.0 is not allowed; -100 to 100"),
    ({"n": 2, "seed": MAX_SEED}, f"sampling.seed: {MAX_SEED} is not allowed; at most {MAX_SEED - 1} with n = 2"),
]


def test_every_range_is_tried() -> None:
    assert set(RANGES) == set(IN) == set(OUT)


@pytest.mark.parametrize(("field", "value"), [(field, value) for field in IN for value in IN[field]])
def test_what_is_in_its_range_is_let_through(field: str, value: Any) -> None:
    check_ranges(SamplingParams(**{field: value}))


@pytest.mark.parametrize(("field", "value"), [(field, value) for field in OUT for value in OUT[field]])
def test_what_is_outside_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(RequestError, match=rf"^sampling\.{field}: "):
        check_ranges(SamplingParams(**{field: value}))


@pytest.mark.parametrize(("fields", "message"), MESSAGES)
def test_a_refusal_says_what_is_allowed(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as refused:
        check_ranges(SamplingParams(**fields))
    assert str(refused.value) == message


def test_fewer_choices_may_be_allowed_and_the_highest_seed_is_for_the_last_choice() -> None:
    check_ranges(SamplingParams(n=4), most_choices=4)
    with pytest.raises(RequestError, match="1 to 4"):
        check_ranges(SamplingParams(n=5), most_choices=4)
    check_ranges(SamplingParams(n=2, seed=MAX_SEED - 1))
    check_ranges(SamplingParams(seed=-1))
    check_ranges(SamplingParams(seed=MAX_SEED))


def test_greedy_choices_may_be_many() -> None:
    check_ranges(SamplingParams(n=3, temperature=0.0))


def test_what_is_not_set_is_not_judged() -> None:
    check_ranges(SamplingParams())
