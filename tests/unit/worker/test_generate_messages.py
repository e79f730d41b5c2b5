"""A Generate call's messages: choices told apart, each detail with its own tokens, the finish last."""

from __future__ import annotations

from megatoken.tokens.frames import column
from megatoken.tokens.outbox import FramePart
from megatoken.tokens.responses import WaitingResponses
from megatoken.v1 import tokens_pb2 as pb
from megatoken.v1.frame_columns_pb2 import GenerateResponse
from megatoken.worker.tokens_service import add_part
from tests.support.parts import frame_part


def messages(parts: list[FramePart]) -> list[GenerateResponse]:
    waiting = WaitingResponses()
    for part in parts:
        add_part(waiting, part)
    found = []
    while waiting:
        found.append(GenerateResponse.FromString(waiting.take()))
    return found


def read(parts: list[FramePart]) -> list[tuple[int, list[int], bool]]:
    return [(one.choice, column(one.tokens).tolist(), one.HasField("finish")) for one in messages(parts)]


def row(rank: int) -> pb.Logprobs:
    return pb.Logprobs(width=1, token=[rank], logprob=[-0.5], rank=[rank])


def test_steps_of_one_stream_become_one_message() -> None:
    parts = [
        frame_part([0], [1]),
        frame_part([0], [2, 3], counts=[2]),
        frame_part([0], [4], finishes=[pb.Finish(stream=0)]),
    ]
    assert read(parts) == [(0, [1, 2, 3, 4], True)]


def test_choices_are_told_apart() -> None:
    parts = [
        frame_part([0, 1], [1, 10]),
        frame_part([1, 0], [11, 2, 3], counts=[1, 2], finishes=[pb.Finish(stream=1)]),
    ]
    assert read(parts) == [(0, [1, 2, 3], False), (1, [10, 11], True)]


def test_each_row_stands_where_its_token_stands() -> None:
    parts = [frame_part([0], [token], details=[pb.Detail(stream=0, logprobs=row(token))]) for token in (1, 2, 3)]
    (message,) = messages([*parts, frame_part(finishes=[pb.Finish(stream=0)])])
    assert list(message.detail.logprobs.rank) == column(message.tokens).tolist() == [1, 2, 3]
    assert message.HasField("finish")


def test_a_prompt_s_rows_ahead_of_its_tokens_are_kept() -> None:
    def rows(*ranks: int) -> list[pb.Detail]:
        return [pb.Detail(stream=0, prompt_logprobs=row(rank)) for rank in ranks]

    (message,) = messages([frame_part(details=rows(1)), frame_part(details=rows(2, 3)), frame_part([0], [7])])
    assert list(message.detail.prompt_logprobs.rank) == [1, 2, 3]
    assert column(message.tokens).tolist() == [7]


def test_tokens_that_fill_more_than_a_message_come_in_several_and_the_end_last() -> None:
    count = 600_000
    parts = [frame_part([0], range(count), counts=[count], finishes=[pb.Finish(stream=0)])]
    found = messages(parts)
    assert len(found) == 3
    assert [token for one in found for token in column(one.tokens).tolist()] == list(range(count))
    assert [one.HasField("finish") for one in found] == [False, False, True]
