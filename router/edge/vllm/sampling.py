"""Translates vLLM's SamplingParams into the contract's, once per request.

Only what differs from vLLM's default is sent. What the contract has no field for goes into `extra_json` by vLLM's own
name. What happens at the edge (stop strings, detokenisation, n > 1, which vLLM fans out itself) is not sent at all.
Reads attributes only, so that it can be tested without vLLM. Called by vllm.layer.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Final

from megatoken.errors import RequestError
from megatoken.v1.tokens_pb2 import SamplingParams, StructuredOutputs

# Fields of the same name and meaning, with vLLM's defaults.
PLAIN: Final[dict[str, Any]] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "seed": None,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "max_tokens": None,
    "min_tokens": 0,
    "ignore_eos": False,
    "logprobs": None,
    "prompt_logprobs": None,
}
# vLLM's parameters without a field in the contract, with vLLM's defaults.
EXTRA: Final[dict[str, Any]] = {
    "logprob_token_ids": None,
    "prompt_logprob_token_ids": None,
    "prompt_logprob_start": None,
    "thinking_token_budget": None,
    "repetition_detection": None,
    "extra_args": None,
    "routed_experts_prompt_start": 0,
    "trace_decode_token_ids": None,
}
CONSTRAINTS: Final = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
CONSTRAINT_OPTIONS: Final[dict[str, Any]] = {
    "disable_any_whitespace": False,
    "disable_additional_properties": False,
    "whitespace_pattern": None,
}


def to_contract(params: Any) -> SamplingParams:
    """The contract's SamplingParams for vLLM's. Raises RequestError for what cannot cross a process boundary."""
    message = SamplingParams()
    for name, default in PLAIN.items():
        value = getattr(params, name)
        if value is not None and value != default:
            setattr(message, name, value)
    if params.stop_token_ids:
        message.stop_token_ids.extend(params.stop_token_ids)
    if params.allowed_token_ids:
        message.allowed_token_ids.extend(params.allowed_token_ids)
    for token, bias in (params.logit_bias or {}).items():
        message.logit_bias[token] = bias
    extra = {name: plain(getattr(params, name)) for name, default in EXTRA.items() if differs(params, name, default)}
    # vLLM itself skips the prefix cache for prompt logprobs; only another choice needs saying.
    if params.skip_reading_prefix_cache and params.prompt_logprobs is None:
        extra["skip_reading_prefix_cache"] = True
    if params.watermarking:
        extra["watermarking"] = True
    add_bad_words(message, extra, params)
    add_structured_outputs(message, extra, params.structured_outputs)
    if extra:
        message.extra_json = to_json(extra)
    return message


def add_bad_words(message: SamplingParams, extra: dict[str, Any], params: Any) -> None:
    """Single-token words as ids; with any longer one, the words themselves, which the engine tokenises again."""
    if not params.bad_words:
        return
    sequences = getattr(params, "_bad_words_token_ids", None) or []
    if sequences and all(len(sequence) == 1 for sequence in sequences):
        message.bad_words_token_ids.extend(sequence[0] for sequence in sequences)
    else:
        extra["bad_words"] = list(params.bad_words)


def add_structured_outputs(message: SamplingParams, extra: dict[str, Any], wanted: Any) -> None:
    """The constraint in its typed field, or the whole of it in `extra` when it has options of its own."""
    if wanted is None:
        return
    options = {
        name: getattr(wanted, name) for name, default in CONSTRAINT_OPTIONS.items() if differs(wanted, name, default)
    }
    (name,) = (name for name in CONSTRAINTS if getattr(wanted, name) is not None)
    value = getattr(wanted, name)
    if options:
        extra["structured_outputs"] = {name: value, **options}
        return
    typed = StructuredOutputs()
    if name == "choice":
        typed.choice.values.extend(value)
    elif name == "json":
        typed.json_schema = value if isinstance(value, str) else to_json(value)
    else:
        setattr(typed, name, value)
    message.structured_outputs.CopyFrom(typed)


def differs(source: Any, name: str, default: Any) -> bool:
    """Whether an attribute is there and is not its default."""
    value = getattr(source, name, default)
    return value is not default and not (isinstance(value, bool | int | str | float) and value == default)


def plain(value: Any) -> Any:
    """A value as JSON can hold it: dataclasses and arrays become dicts and lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return value.tolist() if hasattr(value, "tolist") else value


def to_json(value: Any) -> str:
    """Compact JSON. Raises RequestError when the value holds what JSON cannot."""
    try:
        return json.dumps(value, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RequestError("sampling parameters", value, f"they must be JSON values ({error})") from None
