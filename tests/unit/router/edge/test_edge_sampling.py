"""vLLM's SamplingParams to the contract's: what is sent, what is not, and what goes as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from megatoken.errors import RequestError
from megatoken.router.edge.vllm.sampling import EXTRA, PLAIN, to_contract


def params(**changed: Any) -> SimpleNamespace:
    """What vLLM's SamplingParams look like when nothing was asked for."""
    rest = {
        "stop_token_ids": [],
        "allowed_token_ids": None,
        "logit_bias": None,
        "bad_words": [],
        "structured_outputs": None,
        "skip_reading_prefix_cache": False,
        "watermarking": False,
    }
    return SimpleNamespace(**{**PLAIN, **EXTRA, **rest, **changed})


def structured(**changed: Any) -> SimpleNamespace:
    names = ("json", "regex", "choice", "grammar", "json_object", "structural_tag", "whitespace_pattern")
    off = {"disable_any_whitespace": False, "disable_additional_properties": False}
    return SimpleNamespace(**{**dict.fromkeys(names), **off, **changed})


def test_defaults_send_nothing() -> None:
    assert to_contract(params()).SerializeToString() == b""


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0.0),
        ("top_p", 0.5),
        ("top_k", 7),
        ("min_p", 0.25),
        ("seed", 0),
        ("seed", -5),
        ("presence_penalty", -2.0),
        ("frequency_penalty", 1.5),
        ("repetition_penalty", 1.25),
        ("max_tokens", 1),
        ("min_tokens", 3),
        ("ignore_eos", True),
        ("logprobs", 0),
        ("logprobs", -1),
        ("prompt_logprobs", 0),
    ],
)
def test_a_plain_field_is_sent_as_it_is(name: str, value: Any) -> None:
    message = to_contract(params(**{name: value}))
    assert message.HasField(name)
    assert getattr(message, name) == value
    assert not message.extra_json


def test_lists_and_bias() -> None:
    message = to_contract(params(stop_token_ids=[5, 6], allowed_token_ids=[1], logit_bias={9: -100.0, 3: 1.5}))
    assert list(message.stop_token_ids) == [5, 6]
    assert list(message.allowed_token_ids) == [1]
    assert dict(message.logit_bias) == {9: -100.0, 3: 1.5}


def test_single_token_bad_words_go_as_ids_longer_ones_as_words() -> None:
    short = to_contract(params(bad_words=["a"], _bad_words_token_ids=[[1], [2]]))
    assert list(short.bad_words_token_ids) == [1, 2]
    assert not short.extra_json
    long = to_contract(params(bad_words=["a b"], _bad_words_token_ids=[[1], [2, 3]]))
    assert not long.bad_words_token_ids
    assert json.loads(long.extra_json) == {"bad_words": ["a b"]}


@pytest.mark.parametrize(
    ("given", "field", "sent"),
    [
        ({"json": {"type": "object"}}, "json_schema", '{"type":"object"}'),
        ({"json": '{"type": "object"}'}, "json_schema", '{"type": "object"}'),
        ({"regex": "a+"}, "regex", "a+"),
        ({"grammar": "root ::= 'a'"}, "grammar", "root ::= 'a'"),
        ({"json_object": True}, "json_object", True),
        ({"structural_tag": "{}"}, "structural_tag", "{}"),
    ],
)
def test_a_constraint_goes_into_its_field(given: dict[str, Any], field: str, sent: Any) -> None:
    message = to_contract(params(structured_outputs=structured(**given)))
    assert message.structured_outputs.WhichOneof("constraint") == field
    assert getattr(message.structured_outputs, field) == sent


def test_choices_keep_their_order() -> None:
    message = to_contract(params(structured_outputs=structured(choice=["yes", "no"])))
    assert list(message.structured_outputs.choice.values) == ["yes", "no"]


def test_a_constraint_with_options_goes_whole_as_json() -> None:
    message = to_contract(params(structured_outputs=structured(regex="a+", disable_any_whitespace=True)))
    assert not message.HasField("structured_outputs")
    assert json.loads(message.extra_json) == {"structured_outputs": {"regex": "a+", "disable_any_whitespace": True}}


@dataclass
class Repetition:
    max_pattern_size: int = 3
    min_count: int = 2


def test_what_has_no_field_goes_as_json_by_vllms_name() -> None:
    message = to_contract(
        params(repetition_detection=Repetition(), extra_args={"k": 1}, logprob_token_ids=[4], watermarking=True)
    )
    assert json.loads(message.extra_json) == {
        "repetition_detection": {"max_pattern_size": 3, "min_count": 2},
        "extra_args": {"k": 1},
        "logprob_token_ids": [4],
        "watermarking": True,
    }


def test_prompt_logprobs_do_not_repeat_what_they_imply() -> None:
    assert not to_contract(params(prompt_logprobs=1, skip_reading_prefix_cache=True)).extra_json
    assert json.loads(to_contract(params(skip_reading_prefix_cache=True)).extra_json) == {
        "skip_reading_prefix_cache": True
    }


def test_what_json_cannot_hold_is_the_callers_error() -> None:
    with pytest.raises(RequestError, match="must be JSON values"):
        to_contract(params(extra_args={"x": float("nan")}))
