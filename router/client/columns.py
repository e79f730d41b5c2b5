"""ColumnSession: one Session call to one router, in whole frames.

For callers that serve many requests at once: submit encoded requests, get every frame as columns
(`megatoken.tokens.frames.token_columns`), no work per token or per stream here.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from typing import Final

import grpc
from grpc import aio

from megatoken.errors import (
    AuthError,
    DeadlineError,
    MegatokenError,
    NotFoundError,
    OverloadError,
    RequestError,
    UnavailableError,
)
from megatoken.router.client.session import SessionClient
from megatoken.router.secure import channel_to
from megatoken.tls import ClientTls
from megatoken.tokens import wire
from megatoken.tokens.frames import decode_frame
from megatoken.v1.frame_columns_pb2 import Frame

TAKEN_S: Final = 1.0  # for a router to say that it takes a session


class RemoteRequestError(RequestError):
    """A RequestError as the other side put it."""

    def __init__(self, message: str) -> None:
        MegatokenError.__init__(self, message)
        self.field, self.value, self.allowed = "", None, message


class RemoteNotFoundError(RemoteRequestError, NotFoundError):
    pass


def error_of(code: int, message: str, retry_after_ms: int = 0) -> MegatokenError:
    """The exception for a gRPC status code and message."""
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]:
        return OverloadError(message, retry_after_ms / 1000)
    if code == grpc.StatusCode.NOT_FOUND.value[0]:
        return RemoteNotFoundError(message)
    if code in (grpc.StatusCode.INVALID_ARGUMENT.value[0], grpc.StatusCode.OUT_OF_RANGE.value[0]):
        return RemoteRequestError(message)
    if code in (grpc.StatusCode.UNAUTHENTICATED.value[0], grpc.StatusCode.PERMISSION_DENIED.value[0]):
        return AuthError(message)
    if code == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]:
        return DeadlineError(message)
    if code == grpc.StatusCode.UNAVAILABLE.value[0]:
        return UnavailableError(message)
    return MegatokenError(message)


@dataclass(slots=True)
class Numbers:
    """Stream numbers that a session gave out: from `first` on, around the end of 32 bits, up to before `following`."""

    first: int
    following: int

    def take(self, choices: int) -> int:
        """The first of so many in a row."""
        stream = self.following if self.following + choices <= 1 << 32 else 1
        self.following = stream + choices
        return stream

    def __contains__(self, stream: object) -> bool:
        if not isinstance(stream, int):
            return False
        if self.first <= self.following:
            return self.first <= stream < self.following
        return stream >= self.first or stream < self.following


class ColumnSession:
    """`open`, `submit` and `cancel` as often as you like, `frames` in one task, `close`."""

    def __init__(
        self,
        address: str,
        metadata: tuple[tuple[str, str], ...] = (),
        tls: ClientTls | None = None,
        max_request_bytes: int = wire.MAX_REQUEST_BYTES,
        first: int = 1,
    ) -> None:
        """`first`: the first request's stream number."""
        self._max_request_bytes = max_request_bytes
        self.address = address
        self._metadata = metadata
        self._tls = tls
        self._channel: aio.Channel | None = None
        self._session: SessionClient | None = None
        self.numbers = Numbers(first, first)

    async def open(self, timeout_s: float) -> None:
        """Raises UnavailableError when the router does not answer in time, or is about to stop.

        Other refusals come from `frames`.
        """
        self._channel = channel_to(self.address, self._tls)
        try:
            async with asyncio.timeout(timeout_s):  # wait_for may lose a cancel
                await self._channel.channel_ready()
        except TimeoutError:
            raise UnavailableError(f"router {self.address} does not answer within {timeout_s:.0f} s") from None
        session = SessionClient(self._channel, self._metadata)
        taken = await session.begin_taken(min(timeout_s, TAKEN_S))
        self._session = session
        if not taken:
            with contextlib.suppress(TimeoutError):  # it was taken, by an older router
                async with asyncio.timeout(TAKEN_S):
                    code, details = await session.status()
                if code is grpc.StatusCode.UNAVAILABLE:
                    raise UnavailableError(f"router {self.address}: {details}")

    def submit(self, request: bytes, choices: int = 1) -> int:
        """Sends an encoded GenerateRequest; returns its stream number, the first of `choices` in a row.

        Numbers are not used again until 2**32 have been. Raises RequestError for one that is larger than routers take,
        since a message over their limit would end the session for all its requests.
        """
        if len(request) > self._max_request_bytes:
            raise wire.too_large(len(request), self._max_request_bytes)
        stream = self.numbers.take(choices)
        self._opened.start(stream, request)
        return stream

    def cancel(self, streams: Iterable[int]) -> None:
        self._opened.cancel(streams)

    async def frames(self) -> AsyncIterator[Frame]:
        """Frames until the session ends. Raises the error that ended it, or MalformedFrame."""
        session = self._opened
        try:
            while (raw := await session.read()) is not None:
                yield decode_frame(raw)
            code, details = await session.status()
            if code is not grpc.StatusCode.OK:
                raise error_of(code.value[0], f"router {self.address}: {details}")
        except aio.AioRpcError as error:
            raise error_of(error.code().value[0], f"router {self.address}: {error.details()}") from None

    async def close(self) -> None:
        if self._session is not None:
            await self._session.end()
        if self._channel is not None:
            await self._channel.close(None)

    @property
    def _opened(self) -> SessionClient:
        if self._session is None:
            raise RuntimeError("the session is not open")
        return self._session
