"""Gives an error that comes before the first token of a stream its own HTTP status.

vLLM starts a stream with 200 before it knows that the request is accepted, so a refusal would come as a chunk inside a
success. Here the start of a stream waits for its first chunk, and an error in that place becomes the response. The
guard also adds Retry-After where the edge refuses for lack of room. Plain ASGI; no vLLM.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

from megatoken.router.edge.http.outcomes import retry_after_headers

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
ERROR_CHUNK: Final = b'data: {"error"'


class GuardedSend:
    """Wraps the `send` of one HTTP exchange."""

    __slots__ = ("_dropping", "_start", "bodies", "raw", "retry_after_s", "status")

    def __init__(self, send: Send) -> None:
        self.raw = send
        self.bodies = 0  # body messages that went through
        self._start: Message | None = None
        self._dropping = False
        self.status = 0
        self.retry_after_s: float | None = None  # of the refusal that the exchange ends with, where it says

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            if waits(message):
                self._start = message
                return
        elif self._start is not None:
            start, self._start = self._start, None
            error = error_of(message.get("body", b""))
            if start["status"] == 200 and error is None:
                await self.raw(start)
            else:
                await self._refuse(start, message, error)
                return
        elif self._dropping:
            return
        await self.raw(message)
        if message["type"] == "http.response.body":
            self.bodies += 1

    async def _refuse(self, start: Message, message: Message, error: dict[str, Any] | None) -> None:
        body = message.get("body", b"")
        more = message.get("more_body", False)
        if start["status"] == 200 and error is not None:
            self._dropping, more = more, False
            code = error["error"].get("code")
            status = code if isinstance(code, int) and 400 <= code <= 599 else 500
            body = json.dumps(error).encode()
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            start = {**start, "status": status, "headers": headers}
        self.status = start["status"]
        headers = [*start.get("headers", []), *retry_after_headers(start["status"], self.retry_after_s)]
        await self.raw({**start, "headers": headers})
        await self.raw({"type": "http.response.body", "body": body, "more_body": more})


def waits(start: Message) -> bool:
    """Whether a response's start must wait for its first chunk."""
    if start["status"] in (429, 503):
        return not any(name.lower() == b"retry-after" for name, _ in start.get("headers", []))
    if start["status"] != 200:
        return False
    return any(
        name.lower() == b"content-type" and value.startswith(b"text/event-stream")
        for name, value in start.get("headers", [])
    )


def error_of(chunk: bytes) -> dict[str, Any] | None:
    """The error that a stream's first chunk holds, if it holds one."""
    if not chunk.startswith(ERROR_CHUNK):
        return None
    try:
        found = json.loads(chunk.split(b"\n", 1)[0].removeprefix(b"data: "))
    except ValueError:
        return None
    return found if isinstance(found, dict) and isinstance(found.get("error"), dict) else None
