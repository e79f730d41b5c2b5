"""How a request goes on elsewhere: which way is exact for it, and the request that the next one gets. Pure.

Two ways. *Prefix*: prompt plus the tokens so far become the new prompt, limits become what remains. Exact wherever the
next token depends on the tokens alone: greedy or unseeded sampling, top-k/p, bias, repetition penalty; and, since the
worker is told how many of them were generated, presence and frequency penalties and structured output. *Replay*: the
request is sent again as it was, and the tokens that the client has are checked and swallowed; for seeded sampling,
whose random numbers have a state of their own. A router does it when a replica is lost, an edge when its router is.
"""

from __future__ import annotations

from megatoken.v1 import tokens_pb2
from megatoken.v1.frame_columns_pb2 import GenerateRequest


def needs_replay(sampling: tokens_pb2.SamplingParams) -> bool:
    """Whether only a replay goes on exactly: random and seeded."""
    greedy = sampling.HasField("temperature") and sampling.temperature == 0
    return bool(sampling.HasField("seed") and not greedy)


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
    drop_first(detail.logprobs, rows)
    detail.ClearField("prompt_logprobs")


def drop_first(values: tokens_pb2.Logprobs, rows: int) -> None:
    """Takes the first rows out of log probabilities."""
    width = values.width
    for column, per_row in ((values.token, width), (values.logprob, width), (values.rank, 1)):
        del column[: rows * per_row]
