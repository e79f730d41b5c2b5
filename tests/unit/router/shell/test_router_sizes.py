"""No message outgrows the next hop: a request that does is refused alone, and what is large comes in pieces."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from megatoken.errors import RequestError
from megatoken.router.client.client import TokenClient
from megatoken.router.client.columns import ColumnSession
from megatoken.router.shell.calls.generate import GenerateSink, submit_call
from megatoken.tokens.frames import U32, token_columns
from megatoken.tokens.outbox import FrameOutbox, FramePart
from megatoken.tokens.wire import MAX_REQUEST_BYTES
from megatoken.v1 import tokens_pb2
from megatoken.v1.frame_columns_pb2 import Frame
from tests.support.router_core import CoreFleet

GRPC_DEFAULT = 4 << 20  # bytes of a message that a gRPC client takes unless told otherwise


def logprobs(rows: int, width: int, first: int = 0) -> tokens_pb2.Logprobs:
    cells = np.arange(rows * width) + first
    return tokens_pb2.Logprobs(
        width=width, token=cells.tolist(), logprob=(-cells / 7).tolist(), rank=(np.arange(rows) + first).tolist()
    )


def test_the_log_probabilities_of_a_long_prompt_come_in_pieces() -> None:
    whole = tokens_pb2.Detail(stream=7, prompt_logprobs=logprobs(40_000, 21), logprobs=logprobs(1, 3, 9))
    outbox = FrameOutbox()
    outbox.add_part(FramePart(np.array([7], U32), None, np.array([5], U32), [whole.SerializeToString()], [b""]))
    frames = [outbox.take()]
    while outbox:
        frames.append(outbox.take())
    assert max(map(len, frames)) < GRPC_DEFAULT // 2
    joined = tokens_pb2.Detail()
    for detail in (detail for raw in frames for detail in Frame.FromString(raw).detail):
        joined.MergeFrom(detail)
    assert joined == whole
    last = Frame.FromString(frames[-1])  # the token comes with its own row
    assert token_columns(last)[2].tolist() == [5] or token_columns(Frame.FromString(frames[-2]))[2].tolist() == [5]


def test_a_held_answer_s_log_probabilities_stay_with_their_tokens() -> None:
    count = 60
    details = [
        tokens_pb2.Detail(stream=3, logprobs=logprobs(1, 10_000, row)).SerializeToString() for row in range(count)
    ]
    outbox = FrameOutbox()
    outbox.add_part(
        FramePart(np.array([3, 4], U32), np.array([count, 2], U32), np.arange(count + 2, dtype=U32), details, [])
    )
    seen: dict[int, list[int]] = {3: [], 4: []}
    rows: list[int] = []
    while outbox:
        raw = outbox.take()
        assert len(raw) < GRPC_DEFAULT // 2
        frame = Frame.FromString(raw)
        stream, counts, token = token_columns(frame)
        each = stream if counts is None else np.repeat(stream, counts)
        for number, value in zip(each.tolist(), token.tolist(), strict=True):
            seen[number].append(value)
        rows += [rank for detail in frame.detail for rank in detail.logprobs.rank]
        assert len(rows) == len(seen[3])
    assert seen == {3: list(range(count)), 4: [count, count + 1]}
    assert rows == list(range(count))


class Call:
    """A Generate call whose client reads when told."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.gate: asyncio.Future[None] | None = None

    async def write(self, message: bytes) -> None:
        if self.gate is not None:
            await self.gate
        self.written.append(message)

    def time_remaining(self) -> None:
        return None

    def invocation_metadata(self) -> tuple[()]:
        return ()


class NoCorks:
    def hold(self, _: object) -> None:
        pass


async def test_generate_gives_large_details_in_pieces() -> None:
    call: Any = Call()
    sink = GenerateSink(call, NoCorks(), None)  # type: ignore[arg-type]
    request: Any = type("R", (), {"choice": 0})()
    sink.own([request])
    whole = tokens_pb2.Detail(stream=7, prompt_logprobs=logprobs(40_000, 21), logprobs=logprobs(1, 3, 9))
    more = tokens_pb2.Detail(stream=7, logprobs=logprobs(1, 3, 12))
    call.gate = asyncio.get_running_loop().create_future()
    sink.push_tokens(request, np.array([4], U32).tobytes(), [])
    sink.push_tokens(request, np.array([5], U32).tobytes(), [whole.SerializeToString()])
    sink.push_tokens(request, np.array([6], U32).tobytes(), [more.SerializeToString()])
    sink.push_finish(request, tokens_pb2.Finish(reason=1).SerializeToString())
    call.gate.set_result(None)
    await asyncio.wait_for(sink.done.wait(), 5)
    assert max(map(len, call.written)) < GRPC_DEFAULT // 2
    answers = [tokens_pb2.GenerateResponse.FromString(raw) for raw in call.written]
    joined = tokens_pb2.Detail()
    for answer in answers:
        joined.MergeFrom(answer.detail)
    whole.stream = 0
    whole.MergeFrom(tokens_pb2.Detail(logprobs=more.logprobs))
    assert joined == whole
    assert [token for answer in answers for token in answer.tokens] == [4, 5, 6]
    assert [answer.HasField("finish") for answer in answers] == [False] * (len(answers) - 1) + [True]


def test_a_generate_that_no_worker_takes_is_refused_by_name() -> None:
    fleet = CoreFleet(limits={"max_request_bytes": 2000})
    raw = tokens_pb2.GenerateRequest(model="m", prompt=[1], cache_salt="s" * 2000).SerializeToString()
    call: Any = Call()
    with pytest.raises(RequestError, match=r"request: '20\d\d bytes' is not allowed; at most 2000 bytes"):
        submit_call(fleet.state, GenerateSink(call, NoCorks(), None), raw, call)  # type: ignore[arg-type]


async def test_a_client_refuses_what_would_end_its_session() -> None:
    session = ColumnSession("127.0.0.1:9", max_request_bytes=100)
    with pytest.raises(RequestError, match="at most 100 bytes"):
        session.submit(b"x" * 101)
    with pytest.raises(RequestError, match=f"at most {MAX_REQUEST_BYTES} bytes"):
        TokenClient(["127.0.0.1:9"]).generate("m", [1], fields={"cache_salt": "s" * MAX_REQUEST_BYTES})
