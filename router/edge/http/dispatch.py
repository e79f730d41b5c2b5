"""Takes each HTTP exchange to the app of the model that its body names.

What all models share is answered here: /health, /v1/models. Keys are checked here. Plain ASGI: the apps are
vLLM's and could be any. Built in __main__.
"""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, Final, Protocol

import msgspec

from megatoken.access.table import Identity, Program, callers_of_route
from megatoken.errors import AuthError
from megatoken.router.edge.http.exchange import EXCHANGE, Exchange
from megatoken.router.edge.http.refusals import GuardedSend
from megatoken.router.identity.callers import Caller, CallerRegistry
from megatoken.router.identity.shown_key import secret_in
from megatoken.tracing import Tracer

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

KEY_HEADERS: Final = (b"authorization", b"x-api-key")
MAX_TRACEPARENT: Final = 128  # bytes; version 00 has 55
HEALTH_PATH: Final = "/health"
MODELS_PATH: Final = "/v1/models"


class NamesModel(msgspec.Struct):
    """The one field of a request body that dispatch reads; the rest is skipped, not decoded."""

    model: str | None = None


class Served(Protocol):
    """One model's app; vllm.layer.ModelApp is one. `name` is the router's name for the model."""

    app: Any

    @property
    def name(self) -> str: ...

    async def list_models(self) -> list[dict[str, Any]]: ...


class Dispatch:
    """`apps` by every name a request may ask for, the default model first."""

    def __init__(
        self,
        apps: Mapping[str, Served],
        is_healthy: Callable[[], bool],
        callers: CallerRegistry,
        max_body_bytes: int,
        tracer: Tracer | None = None,
    ) -> None:
        self._apps = apps
        self._default = next(iter(apps.values()))
        self._single = len({id(app) for app in apps.values()}) == 1
        self._is_healthy = is_healthy
        self._callers = callers
        self._max_body_bytes = max_body_bytes
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._default.app(scope, receive, send)
            return
        path = scope["path"]
        allowed = callers_of_route(Program.EDGE, path)
        if path == HEALTH_PATH:
            await answer(send, 200 if self._is_healthy() else 503, b"")
        elif Identity.ANYONE in allowed:
            await self._default.app(scope, receive, send)
        elif Identity.CLIENT in allowed:
            await self._guarded(scope, receive, send)
        else:  # of vLLM's app too, whose own controls, metrics and version are not for clients
            await answer(send, 404, error_body(404, "NotFoundError", f"{path[:80]} is not served at this address"))

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        shown = credentials(scope)
        try:
            caller = self._callers.identify(shown)
            secret = "" if caller.key is None else secret_in(shown)
            path = scope["path"]
            if path == MODELS_PATH or path.startswith(MODELS_PATH + "/"):
                await self._models(path.removeprefix(MODELS_PATH).strip("/"), caller, send)
            elif scope["method"] == "POST":
                await self._post(scope, receive, GuardedSend(send), caller, secret)
            else:
                await self._default.app(scope, receive, GuardedSend(send))
        except AuthError as error:
            await answer(send, 401, error_body(401, "AuthenticationError", str(error)))

    async def _post(self, scope: Scope, receive: Receive, send: GuardedSend, caller: Caller, secret: str) -> None:
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
        self._callers.admit(caller, served.name)
        parent, span = traceparent(scope), None
        if self._tracer is not None:
            name, attributes = f"edge {scope['path']}", {"gen_ai.request.model": served.name}
            parent, span = self._tracer.begin(name, parent, time.monotonic(), attributes)
        EXCHANGE.set(Exchange(send, secret, parent, span))
        try:
            await served.app(scope, replay(body, receive), send)
        finally:
            if span is not None:
                status = send.status
                failed = None if status and status < 400 else f"status {status}" if status else "no answer"
                span.end(time.monotonic(), {"http.response.status_code": status}, failed)

    async def _models(self, name: str, caller: Caller, send: Send) -> None:
        listed: dict[str, dict[str, Any]] = {}
        for served in {id(app): app for app in self._apps.values()}.values():
            if caller.key is None or caller.key.models is None or served.name in caller.key.models:
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


def credentials(scope: Scope) -> list[tuple[str, str]]:
    """The headers that may carry a key, as the router reads gRPC metadata."""
    return [(name.decode(), value.decode("latin-1")) for name, value in scope["headers"] if name in KEY_HEADERS]


def traceparent(scope: Scope) -> str:
    """The W3C trace context of a request; empty without one, or with one that is too long to be one."""
    found = next((value for name, value in scope["headers"] if name == b"traceparent"), b"")
    return "" if len(found) > MAX_TRACEPARENT else found.decode("latin-1")


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
