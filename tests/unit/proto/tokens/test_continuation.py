"""How a request goes on elsewhere: by prefix or by replay, and what its client has had already."""

from __future__ import annotations

from typing import Any

import pytest

from megatoken.tokens.continuation import drop_rows, needs_replay, prefix_request
from megatoken.tokens.frames import pack
from megatoken.v1 import frame_columns_pb2, tokens_pb2


def rows(*ranks: int, width: int = 2) -> tokens_pb2.Logprobs:
    token = [10 * rank + i for rank in ranks for i in range(width)]
    return tokens_pb2.Logprobs(width=width, token=token, logprob=[float(one) for one in token], rank=ranks)


@pytest.mark.parametrize(
    ("fields", "replay"),
    [
        ({}, False),
        ({"seed": 0}, True),
        ({"seed": 5}, True),
        ({"seed": 5, "temperature": 0.0}, False),
        ({"seed": 5, "temperature": 0.1}, True),
        ({"temperature": 0.1}, False),
        ({"temperature": 0.0}, False),
    ],
)
def test_only_random_and_seeded_sampling_needs_a_replay(fields: dict[str, Any], replay: bool) -> None:
    assert needs_replay(tokens_pb2.SamplingParams(**fields)) is replay


@pytest.mark.parametrize(
    ("before", "generated", "after"),
    [
        ({"max_tokens": 10, "min_tokens": 4}, 3, {"max_tokens": 7, "min_tokens": 1}),
        ({"max_tokens": 10, "min_tokens": 4}, 4, {"max_tokens": 6, "min_tokens": 0}),
        ({"max_tokens": 10, "min_tokens": 4}, 5, {"max_tokens": 5, "min_tokens": 0}),
        ({}, 3, {}),
        ({"prompt_logprobs": 2, "logprobs": 1}, 3, {"logprobs": 1}),
    ],
)
def test_the_next_worker_gets_prompt_and_tokens_so_far_and_the_limits_that_are_left(
    before: dict[str, Any], generated: int, after: dict[str, Any]
) -> None:
    request = frame_columns_pb2.GenerateRequest(model="m", prompt=pack((1, 2)))
    request.sampling.CopyFrom(type(request.sampling)(**before))
    made = tuple(range(50, 50 + generated))
    found = tokens_pb2.GenerateRequest.FromString(prefix_request(request.SerializeToString(), pack(made)))
    assert (list(found.prompt), found.resumed_tokens) == ([1, 2, *made], generated)
    assert found.sampling == tokens_pb2.SamplingParams(**after)
    again = tokens_pb2.GenerateRequest.FromString(prefix_request(found.SerializeToString(), pack((9,))))
    assert (list(again.prompt), again.resumed_tokens) == ([1, 2, *made, 9], generated + 1)


@pytest.mark.parametrize(("dropped", "left"), [(0, (1, 2, 3)), (1, (2, 3)), (2, (3,)), (3, ()), (4, ())])
@pytest.mark.parametrize("width", [1, 3])
def test_the_first_rows_are_dropped_from_every_column(dropped: int, left: tuple[int, ...], width: int) -> None:
    detail = tokens_pb2.Detail(stream=4, logprobs=rows(1, 2, 3, width=width), prompt_logprobs=rows(7))
    drop_rows(detail, dropped)
    assert detail == tokens_pb2.Detail(stream=4, logprobs=rows(*left, width=width))
