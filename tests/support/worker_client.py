"""A small client of a worker's own Tokens service, for tests: sessions with packed columns."""

from __future__ import annotations

import asyncio
from typing import Any, Self

import grpc
import numpy as np

from megatoken.tokens.frames import token_columns
from megatoken.v1 import frame_columns_pb2 as columns
from megatoken.v1 import tokens_pb2 as pb

SESSION = "/megatoken.v1.Tokens/Session"


class TestSession:
    """One Session call: starts and cancels streams, and collects what comes per stream."""

    __test__ = False

    def __init__(self, channel: grpc.aio.Channel) -> None:
        open_call = channel.stream_stream(
            SESSION,
            request_serializer=columns.ClientFrame.SerializeToString,
            response_deserializer=columns.Frame.FromString,
        )
        self.call: Any = open_call()
        self.tokens: dict[int, list[int]] = {}
        self.finishes: dict[int, pb.Finish] = {}
        self.loads: list[pb.Load] = []
        self.details: dict[int, list[pb.Detail]] = {}
        self.frames = 0
        self.widest = 0  # streams with tokens in one frame, at most

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.call.cancel()

    async def start(self, requests: dict[int, columns.GenerateRequest]) -> None:
        """Starts one request a stream number, in one message."""
        starts = [columns.Start(stream=number, request=request) for number, request in requests.items()]
        await self.call.write(columns.ClientFrame(start=starts))

    async def cancel(self, *numbers: int) -> None:
        """Aborts streams."""
        await self.call.write(columns.ClientFrame(cancel=np.array(numbers, "<u4").tobytes()))

    async def read(self) -> columns.Frame | None:
        """The next frame, taken into account; None at the end of the call."""
        frame = await self.call.read()
        if frame is grpc.aio.EOF:
            return None
        self.frames += 1
        stream, count, token = token_columns(frame)
        self.widest = max(self.widest, len(stream))
        start = 0
        for at, number in enumerate(stream.tolist()):
            length = 1 if count is None else int(count[at])
            if number in self.finishes:
                raise AssertionError(f"tokens for stream {number} after its finish")
            self.tokens.setdefault(number, []).extend(token[start : start + length].tolist())
            start += length
        for detail in frame.detail:
            self.details.setdefault(detail.stream, []).append(detail)
        for finish in frame.finish:
            if finish.stream in self.finishes:
                raise AssertionError(f"two finishes for stream {finish.stream}")
            self.finishes[finish.stream] = finish
        if frame.HasField("load"):
            self.loads.append(frame.load)
        return frame

    async def until(self, *numbers: int, timeout_s: float = 60.0) -> None:
        """Reads until each of these streams ended."""
        async with asyncio.timeout(timeout_s):
            while not all(number in self.finishes for number in numbers):
                if await self.read() is None:
                    raise AssertionError(f"the session ended: {await self.call.code()} {await self.call.details()}")

    async def until_tokens(self, number: int, count: int, timeout_s: float = 60.0) -> None:
        """Reads until a stream has this many tokens."""
        async with asyncio.timeout(timeout_s):
            while len(self.tokens.get(number, ())) < count:
                if await self.read() is None:
                    raise AssertionError("the session ended")


def request(
    prompt: list[int], timeout_ms: int = 0, resumed_tokens: int = 0, **sampling: Any
) -> columns.GenerateRequest:
    """A request of token ids and sampling fields."""
    return columns.GenerateRequest(
        prompt=np.array(prompt, "<u4").tobytes(),
        sampling=pb.SamplingParams(**sampling),
        timeout_ms=timeout_ms,
        resumed_tokens=resumed_tokens,
    )


async def generate(channel: grpc.aio.Channel, prompt: list[int], **sampling: Any) -> tuple[list[int], pb.Finish]:
    """One Generate call to its end."""
    call = channel.unary_stream(
        "/megatoken.v1.Tokens/Generate",
        request_serializer=columns.GenerateRequest.SerializeToString,
        response_deserializer=columns.GenerateResponse.FromString,
    )
    tokens: list[int] = []
    finish = pb.Finish()
    async for response in call(request(prompt, **sampling), timeout=60):
        tokens += np.frombuffer(response.tokens, "<u4").tolist()
        if response.HasField("finish"):
            finish = response.finish
    return tokens, finish
