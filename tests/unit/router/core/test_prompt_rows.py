"""Which rows of a prompt's log probabilities a request that moved still has to be given."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from megatoken.router.core.prompt_rows import new_prompt_rows
from megatoken.v1 import tokens_pb2


def rows(*ranks: int, width: int = 2) -> tokens_pb2.Logprobs:
    token = [10 * rank + i for rank in ranks for i in range(width)]
    return tokens_pb2.Logprobs(width=width, token=token, logprob=[float(one) for one in token], rank=ranks)


@pytest.mark.parametrize(
    ("had", "here", "sent", "new", "had_after"),
    [
        (0, 0, (1, 2), (1, 2), 2),
        (2, 2, (3, 4), (3, 4), 4),
        (1, 0, (1, 2), (2,), 2),
        (2, 0, (1, 2), (), 2),
        (3, 0, (1, 2), (), 3),
        (3, 2, (3, 4), (4,), 4),
        (3, 3, (4,), (4,), 4),
        (5, 1, (2, 3), (), 5),
    ],
)
def test_of_the_prompt_s_rows_only_those_stay_that_the_client_has_not_had(
    had: int, here: int, sent: tuple[int, ...], new: tuple[int, ...], had_after: int
) -> None:
    request: Any = SimpleNamespace(prompt_rows=had, prompt_rows_here=here)
    detail = tokens_pb2.Detail(prompt_logprobs=rows(*sent))
    assert new_prompt_rows(request, detail) is bool(new)
    assert detail == (tokens_pb2.Detail(prompt_logprobs=rows(*new)) if new else tokens_pb2.Detail())
    assert (request.prompt_rows, request.prompt_rows_here) == (had_after, here + len(sent))


@pytest.mark.parametrize("ranks", [(), (3,)])
def test_a_detail_without_new_rows_of_the_prompt_is_kept_for_its_tokens_rows(ranks: tuple[int, ...]) -> None:
    request: Any = SimpleNamespace(prompt_rows=1, prompt_rows_here=0)
    detail = tokens_pb2.Detail(prompt_logprobs=rows(1), logprobs=rows(*ranks))
    assert new_prompt_rows(request, detail) is bool(ranks)
    assert not detail.HasField("prompt_logprobs")
