"""Checks a request before any engine sees it: pure, shared by every engine.

Each refusal is a RequestError that names the field, its value and what is allowed. What only an engine can tell
(whether a grammar compiles, whether an adapter is loaded) it checks itself. Called by the worker for each request.
"""

from __future__ import annotations

import json
from typing import Any, Final

from megatoken.access.lease import MAX_ID_CHARACTERS
from megatoken.errors import NotFoundError, RequestError
from megatoken.tokens.frames import MalformedFrame, column
from megatoken.tokens.ranges import check_ranges
from megatoken.v1 import frame_columns_pb2 as columns
from megatoken.v1 import tokens_pb2 as pb
from megatoken.worker.engines.engine import EngineFacts, EngineRequest

MAX_TOKEN_LIST: Final = 4096  # members of a token list in sampling; far above any real use
MAX_EXTRA_DEPTH: Final = 32  # levels of extra_json; every process that it passes through recurses over them
MAX_PROMPT_LOGPROBS_BYTES: Final = 64 << 20  # of one request: they come at once, and each hop holds them whole
RESERVED: Final = "megatoken_"  # names beginning so are what a worker tells its own ranks
# What steers an engine's connectors, to hosts that it names itself -> the engine argument that allows it.
TRANSFERS: Final = {"kv_transfer_params": "kv_transfer_config", "ec_transfer_params": "ec_transfer_config"}


def check_request(request: columns.GenerateRequest, model: str, facts: EngineFacts) -> EngineRequest:
    """The checked form of a request for `model`; raises RequestError."""
    if request.model and request.model != model:
        raise NotFoundError("model", request.model, f"this replica serves {model!r}")
    if len(request.request_id) > MAX_ID_CHARACTERS:
        raise RequestError("request_id", request.request_id, f"at most {MAX_ID_CHARACTERS} characters")
    if request.lora and request.lora not in facts.loras:
        allowed = "adapters of this replica: " + (", ".join(facts.loras) or "none")
        raise NotFoundError("lora", request.lora, allowed)
    try:
        prompt = column(request.prompt)
    except MalformedFrame as error:
        raise RequestError("prompt", f"{len(request.prompt)} bytes", str(error)) from None
    _check_prompt(prompt, request.resumed_tokens, facts)
    sampling = request.sampling
    check_sampling(sampling, facts)
    room = facts.max_model_len - len(prompt)
    max_tokens = sampling.max_tokens if sampling.HasField("max_tokens") else room
    if max_tokens > room:
        raise RequestError(
            "sampling.max_tokens",
            max_tokens,
            f"a prompt of {len(prompt)} tokens leaves 1 to {room} of the context of {facts.max_model_len}",
        )
    _check_prompt_logprobs(sampling, len(prompt), facts)
    if sampling.min_tokens > max_tokens:
        raise RequestError("sampling.min_tokens", sampling.min_tokens, f"at most max_tokens, which is {max_tokens}")
    return EngineRequest(
        request_id=request.request_id,
        prompt=prompt,
        sampling=sampling,
        max_tokens=max_tokens,
        choices=sampling.n if sampling.HasField("n") else 1,
        lora=request.lora,
        priority=request.priority,
        cache_salt=request.cache_salt,
        resumed_tokens=request.resumed_tokens,
        traceparent=request.traceparent,
        tell_cached=request.tell_cached_tokens,
    )


def _check_prompt(prompt: Any, resumed_tokens: int, facts: EngineFacts) -> None:
    if len(prompt) == 0:
        raise RequestError("prompt", [], "at least one token id")
    if len(prompt) >= facts.max_model_len:
        allowed = f"1 to {facts.max_model_len - 1} tokens, so that one can be generated in {facts.max_model_len}"
        raise RequestError("prompt", f"{len(prompt)} tokens", allowed)
    highest = int(prompt.max())
    if highest >= facts.vocab_size:
        raise RequestError("prompt", highest, f"token ids are 0 to {facts.vocab_size - 1}")
    if resumed_tokens >= len(prompt):
        raise RequestError("resumed_tokens", resumed_tokens, f"less than the prompt's {len(prompt)} tokens")


def check_sampling(sampling: pb.SamplingParams, facts: EngineFacts) -> None:
    """Checks each sampling field's own range and the token ids in it; raises RequestError."""
    check_ranges(sampling)
    for name in ("stop_token_ids", "bad_words_token_ids", "allowed_token_ids", "logit_bias"):
        _check_token_ids(name, getattr(sampling, name), facts.vocab_size)
    if sampling.HasField("structured_outputs"):
        _check_structured(sampling.structured_outputs)
    _check_extra(read_extra(sampling), facts)


def _check_prompt_logprobs(sampling: pb.SamplingParams, prompt_tokens: int, facts: EngineFacts) -> None:
    if not sampling.HasField("prompt_logprobs"):
        return
    alternatives = sampling.prompt_logprobs if sampling.prompt_logprobs >= 0 else facts.vocab_size
    largest = (MAX_PROMPT_LOGPROBS_BYTES // prompt_tokens - 4) // 8 - 1  # a row is 8 bytes a column, and 4 for its rank
    if alternatives > largest:
        allowed = f"0 to {largest} alternatives a token for a prompt of {prompt_tokens} tokens"
        raise RequestError("sampling.prompt_logprobs", sampling.prompt_logprobs, allowed)


def _check_token_ids(name: str, tokens: Any, vocab_size: int) -> None:
    if len(tokens) > MAX_TOKEN_LIST:
        raise RequestError(f"sampling.{name}", f"{len(tokens)} token ids", f"at most {MAX_TOKEN_LIST}")
    for token in tokens:
        if token >= vocab_size:
            raise RequestError(f"sampling.{name}", token, f"token ids are 0 to {vocab_size - 1}")


def _check_structured(constraint: pb.StructuredOutputs) -> None:
    kind = constraint.WhichOneof("constraint")
    if kind is None:
        raise RequestError("sampling.structured_outputs", "{}", "exactly one constraint")
    if kind == "choice" and not constraint.choice.values:
        raise RequestError("sampling.structured_outputs.choice", [], "at least one choice")
    if kind in ("json_schema", "structural_tag"):
        text = getattr(constraint, kind)
        try:
            json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"sampling.structured_outputs.{kind}", text, f"JSON; {error}") from None


def _check_extra(extra: dict[str, Any], facts: EngineFacts) -> None:
    """Refuses what no engine can be sent, and what would be believed there without a check."""
    if not extra:
        return
    _check_encodable(extra)
    arguments = extra.get("extra_args")
    if not isinstance(arguments, dict | None):
        raise RequestError("sampling.extra_json.extra_args", arguments, "an object")
    for field, names in (("sampling.extra_json", extra), ("sampling.extra_json.extra_args", arguments or {})):
        for name, value in names.items():
            if name.startswith(RESERVED):
                raise RequestError(f"{field}.{name}", value, f"names beginning with {RESERVED} are the worker's own")
            if name in TRANSFERS and value is not None and name not in facts.transfers:
                allowed = f"only a replica whose engine_args have {TRANSFERS[name]} takes it"
                raise RequestError(f"{field}.{name}", value, allowed)


def _check_encodable(extra: dict[str, Any]) -> None:
    """JSON holds integers and texts that the engine's own encoding does not."""
    level: list[Any] = [extra]
    for _ in range(MAX_EXTRA_DEPTH):
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                below += value.keys()
                below += value.values()
            elif isinstance(value, list):
                below += value
            elif isinstance(value, int) and not -(2**63) <= value < 2**64:
                raise RequestError("sampling.extra_json", value, "integers are -2**63 to 2**64 - 1")
            elif isinstance(value, str) and not _is_unicode(value):
                raise RequestError("sampling.extra_json", value, "texts are Unicode, without half of a surrogate pair")
        if not below:
            return
        level = below
    raise RequestError("sampling.extra_json", extra, f"at most {MAX_EXTRA_DEPTH} levels")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_extra(sampling: pb.SamplingParams) -> dict[str, Any]:
    """`extra_json` as a dict; raises RequestError when it is not one JSON object."""
    if not sampling.extra_json:
        return {}
    try:
        extra = json.loads(sampling.extra_json)
    except (ValueError, RecursionError) as error:
        raise RequestError("sampling.extra_json", sampling.extra_json, f"one JSON object; {error}") from None
    if not isinstance(extra, dict):
        raise RequestError("sampling.extra_json", sampling.extra_json, "one JSON object")
    return extra
