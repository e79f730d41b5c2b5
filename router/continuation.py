"""How a request goes on elsewhere: which way is exact for it, and the request that the next worker gets. Pure.

Two ways. *Prefix*: prompt plus the tokens so far become the new prompt, limits become what remains. Exact wherever the
next token depends on the tokens alone: greedy or unseeded sampling, top-k/p, bias, repetition penalty. *Replay*: the
request is sent again as it was, and the tokens that the client has are checked and swallowed; for sampling that has a
state of its own: a seed, presence and frequency penalties (they count generated tokens only), structured output,
parameters that only the engine knows. A request of that kind without a seed is given one, so that a replay can be
exact.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatoken.v1.frame_columns_pb2 import GenerateRequest

if TYPE_CHECKING:
    import random

    from megatoken.v1 import tokens_pb2


def has_state(sampling: tokens_pb2.SamplingParams) -> bool:
    """Whether only a replay goes on exactly."""
    return bool(
        sampling.HasField("seed")
        or sampling.presence_penalty
        or sampling.frequency_penalty
        or sampling.HasField("structured_outputs")
        or sampling.extra_json
    )


def give_seed(sampling: tokens_pb2.SamplingParams, rng: random.Random) -> None:
    """A seed for sampling that has state, is random, and came without one."""
    greedy = sampling.HasField("temperature") and sampling.temperature == 0
    if not greedy and not sampling.HasField("seed"):
        sampling.seed = rng.getrandbits(31)


def prefix_request(raw: bytes, generated: bytes) -> bytes:
    """The request whose prompt is the old one and the packed tokens generated so far."""
    request = GenerateRequest.FromString(raw)
    tokens = len(generated) // 4
    request.prompt = request.prompt + generated
    request.resumed_tokens += tokens
    sampling = request.sampling
    if sampling.HasField("max_tokens"):
        sampling.max_tokens -= tokens
    if sampling.HasField("min_tokens"):
        sampling.min_tokens = max(0, sampling.min_tokens - tokens)
    sampling.ClearField("prompt_logprobs")  # the client has had them
    return request.SerializeToString()


def drop_rows(detail: tokens_pb2.Detail, rows: int) -> None:
    """Takes the log probabilities of the first `rows` tokens out of a Detail: the client has had them."""
    values = detail.logprobs
    width = values.width
    for column, per_row in ((values.token, width), (values.logprob, width), (values.rank, 1)):
        del column[: rows * per_row]
    detail.ClearField("prompt_logprobs")
