"""Whether a request is well-formed: what the router can tell without an engine. Pure.

The worker checks again, since clients may reach it directly, and knows more (grammars, adapters).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatoken.errors import NotFoundError, RequestError, UnavailableError
from megatoken.router.config import LimitsConfig
from megatoken.tokens.frames import MalformedFrame, column
from megatoken.tokens.ranges import check_ranges
from megatoken.v1 import tokens_pb2
from megatoken.v1.frame_columns_pb2 import GenerateRequest

if TYPE_CHECKING:
    from megatoken.router.fleet.fleet import EndpointTable, Pool


def pool_of(fleet: EndpointTable, model: str) -> Pool:
    """The model's pool. Raises NotFoundError, naming what there is; UnavailableError before any snapshot came."""
    pool = fleet.pools.get(model)
    if pool is None or not (pool.known or pool.replicas):
        if not fleet.told:
            raise UnavailableError("this router has not been told of any replica yet")
        names = sorted(name for name, p in fleet.pools.items() if p.known or p.replicas)
        shown = ", ".join(names[:20]) or "none is served now"
        raise NotFoundError("model", model, f"one of: {shown}")
    return pool


def check_request(request: GenerateRequest, pool: Pool, limits: LimitsConfig) -> tuple[int, int]:
    """(prompt tokens, tokens it may generate). Raises RequestError naming field, value and what is allowed."""
    try:
        prompt = column(request.prompt)
    except MalformedFrame as error:
        raise RequestError("prompt", f"{len(request.prompt)} bytes", f"packed fixed32 token ids ({error})") from None
    length = len(prompt)
    if not length:
        raise RequestError("prompt", "", "at least one token id")
    if length > limits.max_prompt_tokens:
        raise RequestError("prompt", f"{length} tokens", f"at most {limits.max_prompt_tokens} tokens")
    if pool.vocab_size and int(prompt.max()) >= pool.vocab_size:
        raise RequestError("prompt", int(prompt.max()), f"token ids below the vocabulary's size, {pool.vocab_size}")
    _check_times(request, limits)
    sampling = request.sampling
    check_ranges(sampling, limits.max_n)
    context = pool.max_model_len
    wanted = _max_tokens(sampling, length, context)
    return length, wanted


def check_priority(request: GenerateRequest, highest: int) -> None:
    """Raises RequestError for a priority that goes before what the caller may ask for: it would pass all fairness."""
    if request.priority < highest:
        raise RequestError("priority", request.priority, f"{highest} or more for this caller (lower runs earlier)")


def _check_times(request: GenerateRequest, limits: LimitsConfig) -> None:
    if request.timeout_ms > limits.max_timeout_ms:
        raise RequestError("timeout_ms", request.timeout_ms, f"at most {limits.max_timeout_ms}")
    if request.max_delay_ms > limits.max_delay_ms:
        raise RequestError("max_delay_ms", request.max_delay_ms, f"at most {limits.max_delay_ms}")


def _max_tokens(sampling: tokens_pb2.SamplingParams, length: int, context: int) -> int:
    if context and length >= context:
        raise RequestError("prompt", f"{length} tokens", f"at most {context - 1} tokens (context of {context})")
    if not sampling.HasField("max_tokens"):
        return context - length if context else 16
    wanted = sampling.max_tokens
    if context and length + wanted > context:
        raise RequestError(
            "sampling.max_tokens", wanted, f"at most {context - length} (context of {context}, prompt {length})"
        )
    if sampling.min_tokens > wanted:
        raise RequestError("sampling.min_tokens", sampling.min_tokens, f"at most max_tokens, {wanted}")
    return wanted
