"""Both validators refuse by one table; each boundary of it is tried from both sides."""

from __future__ import annotations

import math
from typing import Any

import pytest

from megatoken.errors import RequestError
from megatoken.tokens.ranges import MAX_SEED, RANGES, Range, check_ranges
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


@pytest.mark.parametrize(
    ("allowed", "written"),
    [
        (Range(0.5), "at least 0.5"),
        (Range(0.5, above=True), "above 0.5"),
        (Range(-1, meaning=", all"), "at least -1, all"),
        (Range(0.5, 2.0), "0.5 to 2"),
        (Range(0.5, 2.0, above=True), "above 0.5 and at most 2"),
    ],
)
def test_a_range_is_written_for_people(allowed: Range, written: str) -> None:
    assert str(allowed) == written


@pytest.mark.parametrize(
    ("choices", "most"), [(1, MAX_SEED), (2, MAX_SEED - 1), (3, MAX_SEED - 2), (128, MAX_SEED - 127)]
)
def test_the_highest_seed_leaves_one_to_every_choice(choices: int, most: int) -> None:
    check_ranges(SamplingParams(n=choices, seed=most))
    if choices > 1:
        with pytest.raises(RequestError, match=f"at most {most} with n = {choices}"):
            check_ranges(SamplingParams(n=choices, seed=most + 1))


@pytest.mark.parametrize("bias", [-100.0, 100.0, 0.0])
def test_a_bias_within_its_range_is_let_through(bias: float) -> None:
    check_ranges(SamplingParams(logit_bias={7: bias}))


@pytest.mark.parametrize("bias", [-100.001, 100.001, math.nan, math.inf])
def test_a_bias_outside_is_refused(bias: float) -> None:
    with pytest.raises(RequestError, match=r"^sampling\.logit_bias\[7\]: "):
        check_ranges(SamplingParams(logit_bias={6: 1.0, 7: bias}))


def test_a_refusal_shows_six_places_of_a_number() -> None:
    with pytest.raises(RequestError, match=r"^sampling\.min_p: 1\.234568 is"):
        check_ranges(SamplingParams(min_p=1.23456789))
