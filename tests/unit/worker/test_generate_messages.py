"""A Generate call's messages: one a choice, each detail with its own tokens, the finish last."""

from __future__ import annotations

import numpy as np

from megatoken.tokens.frames import column
from megatoken.v1 import tokens_pb2 as pb
from megatoken.v1.frame_columns_pb2 import GenerateResponse
from megatoken.worker.streams.outlet import Taken
from megatoken.worker.streams.part import StreamPart
from megatoken.worker.tokens_service import responses


def part(streams, tokens, counts=None, details=(), finishes=()) -> StreamPart:
    pack = lambda values: np.array(values, "<u4").tobytes()  # noqa: E731
    return StreamPart(
        pack(streams), b"" if counts is None else pack(counts), pack(tokens), list(details), list(finishes)
    )


def read(parts: list[StreamPart]) -> list[tuple[int, list[int], bool, bool]]:
    found = []
    for raw in responses(Taken(parts, None, 0)):
        message = GenerateResponse.FromString(raw)
        found.append(
            (message.choice, column(message.tokens).tolist(), message.HasField("detail"), message.HasField("finish"))
        )
    return found


def test_steps_of_one_stream_become_one_message() -> None:
    parts = [part([0], [1]), part([0], [2, 3], counts=[2]), part([0], [4], finishes=[pb.Finish(stream=0)])]
    assert read(parts) == [(0, [1, 2, 3, 4], False, True)]


def test_choices_are_told_apart() -> None:
    parts = [part([0, 1], [1, 10]), part([1, 0], [11, 2, 3], counts=[1, 2], finishes=[pb.Finish(stream=1)])]
    assert read(parts) == [(0, [1, 2, 3], False, False), (1, [10, 11], False, True)]


def test_each_detail_goes_with_its_own_tokens() -> None:
    parts = [part([0], [token], details=[pb.Detail(stream=0, logprobs=pb.Logprobs(width=1))]) for token in (1, 2, 3)]
    parts[-1].finishes.append(pb.Finish(stream=0))
    assert read(parts) == [(0, [1], True, False), (0, [2], True, False), (0, [3], True, True)]


def test_a_prompt_s_rows_ahead_of_its_tokens_are_kept() -> None:
    def rows(first: int) -> pb.Detail:
        return pb.Detail(stream=0, prompt_logprobs=pb.Logprobs(width=1, rank=[first]))

    parts = [part([], [], details=[rows(1)]), part([], [], details=[rows(2), rows(3)]), part([0], [7])]
    parts.append(part([], [], finishes=[pb.Finish(stream=0)]))
    messages = [GenerateResponse.FromString(raw) for raw in responses(Taken(parts, None, 0))]
    assert [list(message.detail.prompt_logprobs.rank) for message in messages] == [[1], [2], [3]]
    assert [column(message.tokens).tolist() for message in messages] == [[], [], [7]]
    assert [message.HasField("finish") for message in messages] == [False, False, True]
