"""vLLM's internals that the edge stands on. An upgrade that moves one fails here, by name."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import EngineCoreClient

from megatoken.router.edge.http.outcomes import VLLM_REASON
from megatoken.router.edge.vllm.engine_core import CoreReceiver
from megatoken.router.edge.vllm.sampling import CONSTRAINT_OPTIONS, CONSTRAINTS, EXTRA, PLAIN, to_contract
from megatoken.v1.tokens_pb2 import Detail, Logprobs

# What never leaves the edge: text, fan-out, delivery, and what vLLM derives.
AT_THE_EDGE = {
    "n", "stop", "detokenize", "skip_special_tokens", "spaces_between_special_tokens", "include_stop_str_in_output",
    "output_kind", "stream_interval", "skip_clone", "output_text_buffer_length", "flat_logprobs", "_eos_token_id",
    "_all_stop_token_ids", "_watermarking_skipped", "_bad_words_token_ids",
}  # fmt: skip
TRANSLATED = {
    "stop_token_ids", "allowed_token_ids", "logit_bias", "bad_words", "structured_outputs", "skip_reading_prefix_cache",
    "watermarking",
}  # fmt: skip


def test_every_sampling_parameter_is_accounted_for() -> None:
    assert set(SamplingParams.__struct_fields__) == AT_THE_EDGE | TRANSLATED | set(PLAIN) | set(EXTRA)


def test_our_defaults_are_vllms() -> None:
    defaults = {field.name: field.default for field in msgspec.structs.fields(SamplingParams)}
    for name, value in {**PLAIN, **EXTRA}.items():
        if name != "max_tokens":  # vLLM's own default of 16 is never meant at a server
            assert defaults[name] == value, name


def test_every_constraint_is_accounted_for() -> None:
    fields = {name for name in StructuredOutputsParams.__dataclass_fields__ if not name.startswith("_")}
    assert fields == set(CONSTRAINTS) | set(CONSTRAINT_OPTIONS)


def test_untouched_parameters_send_only_the_limit() -> None:
    message = to_contract(SamplingParams(max_tokens=5))
    assert [field.name for field, _ in message.ListFields()] == ["max_tokens"]


def test_finish_reasons_have_their_names() -> None:
    assert set(VLLM_REASON.values()) | {"ERROR"} == {reason.name for reason in FinishReason}


def test_the_engine_core_is_made_in_one_place() -> None:
    assert "EngineCoreClient.make_async_mp_client(" in inspect.getsource(AsyncLLM.__init__)
    assert isinstance(inspect.getattr_static(EngineCoreClient, "make_async_mp_client"), staticmethod)


def test_outputs_and_requests_have_the_fields_we_set() -> None:
    assert EngineCoreOutput.__struct_fields__[:2] == ("request_id", "new_token_ids")
    for name in ("new_logprobs", "new_prompt_logprobs_tensors", "finish_reason", "stop_reason", "prefill_stats"):
        assert name in EngineCoreOutput.__struct_fields__
    for name in ("prompt_token_ids", "mm_features", "prompt_embeds", "lora_request", "cache_salt", "priority"):
        assert name in EngineCoreRequest.__struct_fields__


def test_a_long_prompts_log_probabilities_in_pieces_reach_vllm_as_one() -> None:
    def rows(first: int, last: int) -> Detail:
        numbers = range(first, last)
        return Detail(prompt_logprobs=Logprobs(width=1, token=numbers, logprob=[-1.0] * len(numbers), rank=numbers))

    core: Any = SimpleNamespace(pending=[])
    receiver = CoreReceiver(core, "r", 6)
    receiver.feed([], [rows(0, 2)], None)
    receiver.feed([], [rows(2, 4)], None)
    assert core.pending == []
    receiver.feed([7], [rows(4, 5)], None)
    receiver.feed([8], None, None)
    first, second = core.pending
    assert (first.new_token_ids, second.new_token_ids) == ([7], [8])
    assert first.new_prompt_logprobs_tensors.logprob_token_ids.flatten().tolist() == [0, 1, 2, 3, 4]
    assert second.new_prompt_logprobs_tensors is None
