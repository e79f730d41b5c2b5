"""Takes each HTTP exchange to the app of the model that its body names.

What all models share is answered here: /health, /metrics, /v1/models. Keys are checked here. Plain ASGI: the apps are
vLLM's and could be any. Built in __main__.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from contextvars import ContextVar
from typing import Any, Final, Protocol

import msgspec

from router.edge.direct import Exchange
from router.edge.refusals import GuardedSend

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS: Final = frozenset({"/health", "/ping", "/version", "/metrics"})  # need no key, as with vLLM
MODELS_PATH: Final = "/v1/models"
EXCHANGE: ContextVar[Exchange | None] = ContextVar("exchange", default=None)  # read where vLLM starts a generation


class NamesModel(msgspec.Struct):
    """The one field of a request body that dispatch reads; the rest is skipped, not decoded."""

    model: str | None = None


class Served(Protocol):
    """One model's app; vllm_layer.ModelApp is one."""

    app: Any

    async def list_models(self) -> list[dict[str, Any]]: ...


class Dispatch:
    """`apps` by every name a request may ask for, the default model first."""

    def __init__(
        self,
        apps: dict[str, Served],
        is_healthy: Callable[[], bool],
        exposition: Callable[[], bytes],
        allowed: Callable[[str | None], bool] | None,
        max_body_bytes: int,
    ) -> None:
        self._apps = apps
        self._default = next(iter(apps.values()))
        self._single = len({id(app) for app in apps.values()}) == 1
        self._is_healthy = is_healthy
        self._exposition = exposition
        self._allowed = allowed
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._default.app(scope, receive, send)
            return
        path = scope["path"]
        if self._allowed is not None and path not in OPEN_PATHS and not self._allowed(bearer(scope)):
            await answer(send, 401, error_body(401, "AuthenticationError", "no API key, or one that is not valid here"))
        elif path == "/health":
            await answer(send, 200 if self._is_healthy() else 503, b"")
        elif path == "/metrics":
            await answer(send, 200, self._exposition(), b"text/plain; version=0.0.4; charset=utf-8")
        elif path == MODELS_PATH or path.startswith(MODELS_PATH + "/"):
            await self._models(path.removeprefix(MODELS_PATH).strip("/"), send)
        elif scope["method"] == "POST":
            await self._post(scope, receive, GuardedSend(send))
        else:
            await self._default.app(scope, receive, GuardedSend(send))

    async def _post(self, scope: Scope, receive: Receive, send: GuardedSend) -> None:
        body = await read_body(receive, self._max_body_bytes)
        if body is None:
            message = f"body: more than {self._max_body_bytes} bytes is not allowed"
            await answer(send, 413, error_body(413, "RequestEntityTooLarge", message))
            return
        name = model_of(body)
        served = self._apps.get(name) if name is not None else self._default
        if served is None:
            if not self._single:  # with one model vLLM's own answer names its adapters too
                known = ", ".join(self._apps)
                message = f"The model `{name}` does not exist. Valid aliases: {known}."
                await answer(send, 404, error_body(404, "NotFoundError", message, "model"))
                return
            served = self._default
        EXCHANGE.set(Exchange(send))
        await served.app(scope, replay(body, receive), send)

    async def _models(self, name: str, send: Send) -> None:
        listed: dict[str, dict[str, Any]] = {}
        for served in {id(app): app for app in self._apps.values()}.values():
            listed.update((card["id"], card) for card in await served.list_models())
        if not name:
            await answer(send, 200, encode({"object": "list", "data": list(listed.values())}))
        elif name in listed:
            await answer(send, 200, encode(listed[name]))
        else:
            message = f"The model `{name}` does not exist. Valid aliases: {', '.join(listed)}."
            await answer(send, 404, error_body(404, "NotFoundError", message, "model"))


def model_of(body: bytes) -> str | None:
    """The model a JSON body names; None when it names none, or is not such JSON: vLLM's app then says what is wrong."""
    try:
        return msgspec.json.decode(body, type=NamesModel).model
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def bearer(scope: Scope) -> str | None:
    """The bearer token of a request."""
    for name, value in scope["headers"]:
        if name == b"authorization":
            kind, _, token = value.decode("latin-1").partition(" ")
            return token.strip() if kind.lower() == "bearer" else None
    return None


async def read_body(receive: Receive, limit: int) -> bytes | None:
    """The whole body; None when it is longer than `limit`. An abrupt end gives what there was."""
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return b"".join(parts)
        part = message.get("body", b"")
        size += len(part)
        if size > limit:
            return None
        parts.append(part)
        if not message.get("more_body", False):
            return parts[0] if len(parts) == 1 else b"".join(parts)


def replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body that was read already, then what really follows (a disconnect)."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def encode(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def error_body(status: int, kind: str, message: str, param: str | None = None) -> bytes:
    """An error as vLLM and OpenAI write it."""
    return encode({"error": {"message": message, "type": kind, "param": param, "code": status}})


async def answer(send: Send, status: int, body: bytes, content_type: bytes = b"application/json") -> None:
    """A whole response."""
    headers = [(b"content-type", content_type), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
