"""Each wrong request is refused with the field, its value and what is allowed; each right one passes unchanged."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from megatoken.errors import NotFoundError, RequestError
from megatoken.v1 import frame_columns_pb2 as columns
from megatoken.v1 import tokens_pb2 as pb
from megatoken.worker.engines.engine import EngineFacts
from megatoken.worker.engines.requests import check_request

FACTS = EngineFacts("simulated", "1", 100, 1000, 8, 16, 10_000, loras=("french",))
DEEP = "{" + '"extra_args": ' + "[" * 40 + "]" * 40 + "}"


def message(prompt=(1, 2, 3), **fields) -> columns.GenerateRequest:
    sampling = pb.SamplingParams(**fields.pop("sampling", {}))
    return columns.GenerateRequest(prompt=np.array(prompt, "<u4").tobytes(), sampling=sampling, **fields)


def test_a_plain_request_gets_the_rest_of_the_context() -> None:
    request = check_request(message(request_id="r", priority=-3, cache_salt="s"), "m", FACTS)
    assert request.prompt.tolist() == [1, 2, 3]
    assert (request.max_tokens, request.choices, request.priority, request.cache_salt) == (97, 1, -3, "s")


def test_limits_are_inclusive() -> None:
    request = check_request(message([5] * 99, sampling={"max_tokens": 1, "min_tokens": 1, "top_k": -1}), "m", FACTS)
    assert request.max_tokens == 1
    check_request(message([999], sampling={"top_p": 1.0, "min_p": 0.0, "temperature": 0.0, "n": 1}), "m", FACTS)
    check_request(message(sampling={"presence_penalty": -2, "frequency_penalty": 2, "n": 4}), "m", FACTS)


@pytest.mark.parametrize(
    ("fields", "field", "allowed"),
    [
        ({"prompt": ()}, "prompt", "at least one"),
        ({"prompt": [1] * 100}, "prompt", "1 to 99 tokens"),
        ({"prompt": [1, 1000]}, "prompt", "0 to 999"),
        ({"resumed_tokens": 3}, "resumed_tokens", "less than the prompt's 3"),
        ({"request_id": "x" * 257}, "request_id", "256"),
        ({"sampling": {"max_tokens": 98}}, "sampling.max_tokens", "1 to 97"),
        ({"sampling": {"max_tokens": 2, "min_tokens": 3}}, "sampling.min_tokens", "at most max_tokens"),
        ({"sampling": {"temperature": -0.5}}, "sampling.temperature", "at least 0"),
        ({"sampling": {"top_p": 0.0}}, "sampling.top_p", "above 0 and at most 1"),
        ({"sampling": {"n": 0}}, "sampling.n", "1 to 128"),
        ({"sampling": {"stop_token_ids": [1000]}}, "sampling.stop_token_ids", "0 to 999"),
        ({"sampling": {"allowed_token_ids": [5, 4000]}}, "sampling.allowed_token_ids", "0 to 999"),
        ({"sampling": {"bad_words_token_ids": [4000]}}, "sampling.bad_words_token_ids", "0 to 999"),
        ({"sampling": {"stop_token_ids": [1] * 5000}}, "sampling.stop_token_ids", "at most 4096"),
        ({"sampling": {"logit_bias": {4000: 1.0}}}, "sampling.logit_bias", "0 to 999"),
        ({"sampling": {"logit_bias": {4: 101.0}}}, "sampling.logit_bias[4]", "-100 to 100"),
        ({"sampling": {"extra_json": "{"}}, "sampling.extra_json", "one JSON object"),
        ({"sampling": {"extra_json": "[1]"}}, "sampling.extra_json", "one JSON object"),
        ({"sampling": {"extra_json": '{"megatoken_x": 1}'}}, "sampling.extra_json.megatoken_x", "the worker's own"),
        (
            {"sampling": {"extra_json": '{"extra_args": {"megatoken_penalties": ["a", "b", "c"]}}'}},
            "sampling.extra_json.extra_args.megatoken_penalties",
            "the worker's own",
        ),
        (
            {"sampling": {"extra_json": '{"extra_args": {"kv_transfer_params": {"remote_host": "h"}}}'}},
            "sampling.extra_json.extra_args.kv_transfer_params",
            "kv_transfer_config",
        ),
        ({"sampling": {"extra_json": '{"extra_args": [1]}'}}, "sampling.extra_json.extra_args", "an object"),
        ({"sampling": {"extra_json": '{"extra_args": {"a": [18446744073709551616]}}'}}, "sampling.extra_json", "2**64"),
        ({"sampling": {"extra_json": '{"seed": -9223372036854775809}'}}, "sampling.extra_json", "-2**63"),
        ({"sampling": {"extra_json": '{"extra_args": {"a": "\\ud800"}}'}}, "sampling.extra_json", "Unicode"),
        ({"sampling": {"prompt_logprobs": 5_000_000}}, "sampling.prompt_logprobs", "0 to 2796201 alternatives"),
        ({"sampling": {"extra_json": DEEP}}, "sampling.extra_json", "32 levels"),
        ({"sampling": {"structured_outputs": {}}}, "sampling.structured_outputs", "exactly one"),
        ({"sampling": {"structured_outputs": {"choice": {}}}}, "sampling.structured_outputs.choice", "at least one"),
        ({"sampling": {"structured_outputs": {"json_schema": "{"}}}, "sampling.structured_outputs.json_schema", "JSON"),
    ],
)
def test_a_wrong_request_names_field_and_what_is_allowed(fields: dict, field: str, allowed: str) -> None:
    with pytest.raises(RequestError) as caught:
        check_request(message(**fields), "m", FACTS)
    assert caught.value.field == field
    assert allowed in str(caught.value)
    assert len(str(caught.value)) < 400


def test_transfer_parameters_pass_where_the_engine_has_a_connector() -> None:
    extra = '{"extra_args": {"kv_transfer_params": {"do_remote_decode": true}, "mine": 18446744073709551615}}'
    facts = dataclasses.replace(FACTS, transfers=("kv_transfer_params",))
    check_request(message(sampling={"extra_json": extra}), "m", facts)


def test_an_unknown_model_or_adapter_is_not_found() -> None:
    with pytest.raises(NotFoundError, match="serves 'm'"):
        check_request(message(model="other"), "m", FACTS)
    with pytest.raises(NotFoundError, match="french"):
        check_request(message(lora="german"), "m", FACTS)
    assert check_request(message(model="m", lora="french"), "m", FACTS).lora == "french"


def test_a_prompt_of_odd_bytes_is_refused() -> None:
    with pytest.raises(RequestError, match="prompt"):
        check_request(columns.GenerateRequest(prompt=b"\0\0\0"), "m", FACTS)
