"""Serves Generate: one request per call, one token per message, several when the call falls behind."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from megatoken.errors import RETRY_AFTER_KEY, MegatokenError, OverloadError, RequestError, grpc_status
from megatoken.v1 import tokens_pb2
from megatoken.v1.frame_columns_pb2 import GenerateRequest, GenerateResponse
from router.ending import ERROR
from router.request import Request
from router.slots import DIRECT
from router.state import RouterState
from router.submission import cancel, submit
from router.wire import varint

_CODES = {code.value[0]: code for code in grpc.StatusCode}


class GenerateSink:
    """The outbox of one Generate call, all choices of it."""

    def __init__(self) -> None:
        self._choices: dict[int, list[bytes]] = {}
        self._details: dict[int, list[bytes]] = {}
        self._ready: list[bytes] = []
        self._something = asyncio.Event()
        self.requests: list[Request] = []
        self.finished = 0
        self.error: tokens_pb2.Finish | None = None

    def push_tokens(self, request: Request, packed: bytes, details: list[bytes]) -> None:
        if details or request.choice in self._details:
            self._details.setdefault(request.choice, []).extend(details)
        self._choices.setdefault(request.choice, []).append(packed)
        self._something.set()

    def push_finish(self, request: Request, finish: bytes) -> None:
        message = tokens_pb2.Finish.FromString(finish)
        message.stream = 0
        self.finished += 1
        if message.reason == ERROR and len(self.requests) <= 1:
            self.error = message
        self._gather(request.choice, message)
        self._something.set()

    async def take(self) -> list[bytes]:
        """Messages that wait: one a choice, with all of its tokens so far."""
        while not (self._ready or self._choices or self._details):
            self._something.clear()
            await self._something.wait()
        for choice in list(self._choices):
            self._gather(choice, None)
        ready, self._ready = self._ready, []
        return ready

    def _gather(self, choice: int, finish: tokens_pb2.Finish | None) -> None:
        pieces = self._choices.pop(choice, [])
        details = self._details.pop(choice, None)
        packed = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        if finish is None and details is None and choice == 0:
            self._ready.append(b"\x0a" + varint(len(packed)) + packed)
            return
        message = GenerateResponse(tokens=packed, choice=choice)
        for raw in details or ():
            detail = tokens_pb2.Detail.FromString(raw)
            detail.stream = 0
            message.detail.MergeFrom(detail)
        if finish is not None:
            message.finish.CopyFrom(finish)
        self._ready.append(message.SerializeToString())


async def serve_generate(state: RouterState, raw: bytes, context: Any) -> None:
    """One call."""
    sink = GenerateSink()
    model = ""
    try:
        try:
            message = GenerateRequest.FromString(raw)
        except DecodeError:
            raise RequestError("request", f"{len(raw)} bytes", "an encoded GenerateRequest") from None
        model = message.model
        now = time.monotonic()
        left_s = context.time_remaining()
        caller = state.door.identify(context.invocation_metadata())
        deadline_s = float("inf") if left_s is None else now + left_s
        submit(state, sink, DIRECT, 0, message, caller, deadline_s, now, sink.requests.extend)
    except MegatokenError as error:
        state.count_refusal(model, error)
        await refuse(context, error)
        return
    try:
        while True:
            for response in await sink.take():
                await context.write(response)
            if sink.finished == len(sink.requests):
                break
        if sink.error is not None:
            await _fail(context, sink.error)
    finally:
        for request in sink.requests:
            cancel(state, request, time.monotonic())


async def refuse(context: Any, error: MegatokenError) -> None:
    code, text = grpc_status(error)
    if isinstance(error, OverloadError):
        context.set_trailing_metadata(((RETRY_AFTER_KEY, str(max(1, round(error.retry_after_s * 1000)))),))
    await context.abort(code, text)


async def _fail(context: Any, finish: tokens_pb2.Finish) -> None:
    if finish.retry_after_ms:
        context.set_trailing_metadata(((RETRY_AFTER_KEY, str(finish.retry_after_ms)),))
    await context.abort(_CODES.get(finish.code, grpc.StatusCode.UNKNOWN), finish.message)
