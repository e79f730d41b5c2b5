"""Turns a checked request's sampling parameters into vLLM's. Pure but for vLLM's own classes.

Each refusal is a RequestError that names the field as tokens.proto does. Called by engine.py.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

from megatoken.errors import RequestError
from megatoken.v1 import tokens_pb2 as pb
from megatoken.worker.engines.engine import EngineRequest
from megatoken.worker.engines.requests import read_extra

# What vLLM raises for a request that is wrong.
REFUSALS: Final = (VLLMValidationError, ValueError, TypeError)

# Same name and meaning on both sides.
_PLAIN: Final = (
    *("temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty", "frequency_penalty", "repetition_penalty"),
    *("min_tokens", "ignore_eos", "logprobs", "prompt_logprobs"),
)
# Only a front-end that turns tokens into text can honour these; here they would be ignored without a word.
_EDGE_ONLY: Final = {"stop": "stop_token_ids here; stop strings are the edge's", "n": "the field n"}
_OURS: Final = frozenset({"detokenize", "output_kind", "skip_clone", "stream_interval", "output_text_buffer_length"})
_EXTRA: Final = frozenset(
    name for name in SamplingParams.__struct_fields__ if not name.startswith("_") and name not in _OURS
)
_CONSTRAINT: Final = {
    "json_schema": "json",
    "regex": "regex",
    "grammar": "grammar",
    "json_object": "json_object",
    "structural_tag": "structural_tag",
}


def vllm_sampling(request: EngineRequest) -> SamplingParams:
    """vLLM's parameters for one choice of a request. Raises RequestError."""
    sampling = request.sampling
    values = _extra(sampling)
    for name in _PLAIN:
        if sampling.HasField(name):  # type: ignore[arg-type]
            values[name] = getattr(sampling, name)
    if sampling.stop_token_ids:
        values["stop_token_ids"] = list(sampling.stop_token_ids)
    if sampling.logit_bias:
        values["logit_bias"] = dict(sampling.logit_bias)
    if sampling.allowed_token_ids:
        values["allowed_token_ids"] = list(sampling.allowed_token_ids)
    if sampling.HasField("structured_outputs"):
        values["structured_outputs"] = _structured(sampling.structured_outputs)
    values.update(n=1, max_tokens=request.max_tokens, detokenize=False, output_kind=RequestOutputKind.DELTA)
    values["skip_clone"] = True  # made for this request alone; the deep copy would be half of its validation's cost
    try:
        return SamplingParams(**values)
    except REFUSALS as error:
        raise as_request_error(error, "sampling") from error


def forbid_words(params: SamplingParams, sampling: pb.SamplingParams) -> None:
    """Adds single-token bad words, after vLLM has turned its own textual ones into tokens."""
    if sampling.bad_words_token_ids:
        own = [[token] for token in sampling.bad_words_token_ids]
        params._bad_words_token_ids = (params._bad_words_token_ids or []) + own


def choice_sampling(params: SamplingParams, choice: int) -> SamplingParams:
    """The parameters of one of n choices, as vLLM derives them: its own seed each."""
    if choice == 0 or params.seed is None:
        return params
    own = params.clone()
    own.seed = (params.seed + choice + 2**63) % 2**64 - 2**63  # past the largest it goes on at the smallest
    return own


def as_request_error(error: Exception, field: str) -> RequestError:
    """vLLM's refusal as ours: its text already says what is allowed."""
    parameter = getattr(error, "parameter", None)
    name = f"sampling.{parameter}" if parameter else field
    return RequestError(name, getattr(error, "value", None), str(error).split(" (parameter=")[0])


def _extra(sampling: pb.SamplingParams) -> dict[str, Any]:
    values = read_extra(sampling)
    for name in values:
        if name in _EDGE_ONLY and values[name] not in (None, [], 1):
            raise RequestError(f"sampling.extra_json.{name}", values[name], _EDGE_ONLY[name])
        if name not in _EXTRA and name not in _OURS:
            raise RequestError("sampling.extra_json", name, "vLLM's SamplingParams: " + ", ".join(sorted(_EXTRA)))
    kept = {name: value for name, value in values.items() if name in _EXTRA and name not in _EDGE_ONLY}
    if not kept:
        return kept
    try:  # JSON's types into vLLM's: nested parameters, integer keys
        params = msgspec.convert(kept, SamplingParams, strict=False)
    except (msgspec.ValidationError, *REFUSALS) as error:
        raise RequestError("sampling.extra_json", kept, str(error)) from error
    return {name: getattr(params, name) for name in kept}


def _structured(constraint: pb.StructuredOutputs) -> StructuredOutputsParams:
    kind = constraint.WhichOneof("constraint")
    value = list(constraint.choice.values) if kind == "choice" else getattr(constraint, kind or "")
    name = "choice" if kind == "choice" else _CONSTRAINT[kind or ""]
    try:
        return StructuredOutputsParams(**{name: value})
    except REFUSALS as error:
        raise RequestError(f"sampling.structured_outputs.{kind}", value, str(error)) from error
