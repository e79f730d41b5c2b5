"""No message of a worker outgrows what any gRPC client takes, and no row comes twice, late or with another's tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from megatoken.tokens.frames import token_columns
from megatoken.tokens.responses import WaitingResponses
from megatoken.v1 import tokens_pb2 as pb
from megatoken.v1.frame_columns_pb2 import Frame, GenerateResponse
from megatoken.worker.streams.outlet import Outlet
from megatoken.worker.tokens_service import add_part
from tests.support.parts import frame_part

CLIENT_BYTES = 4 << 20  # gRPC's default limit on a received message


def logprobs(first: int, rows: int, width: int) -> pb.Logprobs:
    cells = rows * width
    return pb.Logprobs(
        width=width, token=[first] * cells, logprob=[-0.5] * cells, rank=list(range(first, first + rows))
    )


def frames(outlet: Outlet) -> list[Frame]:
    found = []
    while (taken := outlet.take()) is not None:
        raw = taken.frame()
        assert len(raw) < CLIENT_BYTES
        found.append(Frame.FromString(raw))
    return found


def test_the_rows_of_a_long_prompt_come_in_order_before_the_first_token() -> None:
    rows = 100_000
    detail = pb.Detail(stream=3, prompt_logprobs=logprobs(0, rows, 20), logprobs=logprobs(7, 1, 20))
    outlet = Outlet()
    outlet.push(frame_part([3], [42], details=[detail]))
    ranks: list[int] = []
    for frame in frames(outlet):
        for own in frame.detail:
            ranks += own.prompt_logprobs.rank
        if len(frame.token):
            assert ranks == list(range(rows))
            assert [list(own.logprobs.rank) for own in frame.detail if own.HasField("logprobs")] == [[7]]
    assert ranks == list(range(rows))


@pytest.mark.parametrize(("counts", "width"), [((1, 1, 1), 150_000), ((3, 1, 2), 150_000), ((2, 2, 2), 20)])
def test_tokens_go_with_their_own_rows(counts: tuple[int, ...], width: int) -> None:
    tokens = list(range(sum(counts)))
    details, first = [], 0
    for number, count in enumerate(counts):
        details.append(pb.Detail(stream=number, logprobs=logprobs(first, count, width)))
        first += count
    outlet = Outlet()
    outlet.push(frame_part(range(len(counts)), tokens, counts, details, finishes=[pb.Finish(stream=0, code=5)]))
    seen: list[int] = []
    found = frames(outlet)
    for frame in found:
        stream, count, token = token_columns(frame)
        each = stream if count is None else np.repeat(stream, count)
        for number in dict.fromkeys(each.tolist()):
            mine = token[each == number].tolist()
            ranks = [rank for own in frame.detail if own.stream == number for rank in own.logprobs.rank]
            assert ranks == mine
        seen += token.tolist()
    assert seen == tokens
    assert [len(frame.finish) for frame in found] == [0] * (len(found) - 1) + [1]


def test_a_generate_call_gets_all_of_it_too() -> None:
    rows = 100_000
    detail = pb.Detail(stream=0, prompt_logprobs=logprobs(0, rows, 20))
    outlet = Outlet()
    outlet.push(frame_part([0], [42], details=[detail], finishes=[pb.Finish(stream=0)]))
    ranks: list[int] = []
    messages: list[Any] = []
    waiting = WaitingResponses()
    while (taken := outlet.take()) is not None:
        for part in taken.parts:
            add_part(waiting, part)
        while waiting:
            raw = waiting.take()
            assert len(raw) < CLIENT_BYTES
            messages.append(GenerateResponse.FromString(raw))
            ranks += messages[-1].detail.prompt_logprobs.rank
    assert ranks == list(range(rows))
    assert b"".join(message.tokens for message in messages) == b"\x2a\0\0\0"
    assert [message.HasField("finish") for message in messages] == [False] * (len(messages) - 1) + [True]
