"""HTTP in front of the apps: which model answers, keys, sizes, and errors before the first token of a stream."""

from __future__ import annotations

import hashlib
import json
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import pytest

from megatoken.router.edge.http.dispatch import Dispatch, model_of
from megatoken.router.edge.http.exchange import EXCHANGE
from megatoken.router.edge.http.refusals import GuardedSend
from megatoken.router.identity.api_keys import KeyRing
from megatoken.router.identity.callers import CallerRegistry

Message = MutableMapping[str, Any]
SSE = [(b"content-type", b"text/event-stream; charset=utf-8")]


class Echo:
    """A model's app that says its own name and the body it got."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.bodies: list[bytes] = []

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        self.bodies.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": self.name.encode()})

    async def list_models(self) -> list[dict[str, Any]]:
        return [{"id": self.name}]


class Exchange:
    """One request to an ASGI app, and what it sent."""

    def __init__(self) -> None:
        self.sent: list[Message] = []

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    async def run(
        self, app: Any, method: str, path: str, parts: tuple[bytes, ...] = (b"",), key: str | None = None
    ) -> None:
        waiting = list(parts)

        async def receive() -> Message:
            return {"type": "http.request", "body": waiting.pop(0), "more_body": bool(waiting)}

        headers = [] if key is None else [(b"authorization", f"Bearer {key}".encode())]
        await app({"type": "http", "method": method, "path": path, "headers": headers}, receive, self.send)

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self.sent[0]["headers"])

    @property
    def body(self) -> bytes:
        return b"".join(message["body"] for message in self.sent[1:])


def dispatch(
    *names: str, keys: KeyRing | None = None, healthy: bool = True, limit: int = 1000
) -> tuple[Dispatch, list[Echo]]:
    apps = [Echo(name) for name in names]
    made = Dispatch(
        apps={app.name: app for app in apps},
        is_healthy=lambda: healthy,
        callers=CallerRegistry(keys),
        max_body_bytes=limit,
    )
    return made, apps


async def call(app: Dispatch, method: str, path: str, *parts: bytes, key: str | None = None) -> Exchange:
    exchange = Exchange()
    await exchange.run(app, method, path, parts or (b"",), key)
    return exchange


async def test_the_bodys_model_chooses_the_app_and_the_app_gets_the_whole_body() -> None:
    app, (one, two) = dispatch("one", "two")
    exchange = await call(app, "POST", "/v1/completions", b'{"prompt":"x","mo', b'del":"two"}')
    assert exchange.body == b"two"
    assert two.bodies == [b'{"prompt":"x","model":"two"}']
    assert one.bodies == []


async def test_without_a_model_the_first_answers() -> None:
    app, _ = dispatch("one", "two")
    assert (await call(app, "POST", "/tokenize", b'{"prompt":"x"}')).body == b"one"
    assert (await call(app, "POST", "/tokenize", b"not json")).body == b"one"


async def test_an_unknown_model_is_404_and_names_the_known() -> None:
    app, _ = dispatch("one", "two")
    exchange = await call(app, "POST", "/v1/completions", b'{"model":"three"}')
    assert exchange.status == 404
    error = json.loads(exchange.body)["error"]
    assert error["message"] == "The model `three` does not exist. Valid aliases: one, two."
    assert error["param"] == "model"


async def test_models_of_all_apps_are_listed_together() -> None:
    app, _ = dispatch("one", "two")
    listed = json.loads((await call(app, "GET", "/v1/models")).body)
    assert [card["id"] for card in listed["data"]] == ["one", "two"]
    assert json.loads((await call(app, "GET", "/v1/models/two")).body) == {"id": "two"}
    assert (await call(app, "GET", "/v1/models/three")).status == 404


async def test_health_follows_the_router() -> None:
    assert (await call(dispatch("one")[0], "GET", "/health")).status == 200
    assert (await call(dispatch("one", healthy=False)[0], "GET", "/health")).status == 503


async def test_a_body_over_the_limit_is_413() -> None:
    app, (one,) = dispatch("one", limit=10)
    exchange = await call(app, "POST", "/v1/completions", b"x" * 6, b"x" * 6)
    assert exchange.status == 413
    assert b"more than 10 bytes" in exchange.body
    assert one.bodies == []


def key_ring(path: Path, **allowed: list[str] | None) -> KeyRing:
    """A ring whose keys are their owners' names."""
    keys = [
        {"name": name, "sha256": hashlib.sha256(name.encode()).hexdigest(), "models": models}
        for name, models in allowed.items()
    ]
    path.write_text(json.dumps({"keys": keys}))
    return KeyRing(path)


async def test_keys(tmp_path: Path) -> None:
    app, (one, _) = dispatch("one", "two", keys=key_ring(tmp_path / "keys.json", every=None, some=["two"]))
    for wrong in (None, "wrong"):
        exchange = await call(app, "GET", "/v1/models", key=wrong)
        assert exchange.status == 401
        assert exchange.headers[b"www-authenticate"] == b"Bearer"
        assert (await call(app, "POST", "/tokenize", b"{}", key=wrong)).status == 401
    assert one.bodies == []
    assert (await call(app, "POST", "/v1/completions", b'{"model":"one"}', key="every")).body == b"one"
    assert (await call(app, "GET", "/health")).status == 200
    assert (await call(app, "GET", "/ping")).status == 200


async def test_a_key_may_be_for_some_models_only(tmp_path: Path) -> None:
    app, (one, _) = dispatch("one", "two", keys=key_ring(tmp_path / "keys.json", some=["two"]))
    refused = await call(app, "POST", "/v1/completions", b'{"model":"one"}', key="some")
    assert refused.status == 401
    assert "not allowed 'one'; one of: two" in json.loads(refused.body)["error"]["message"]
    assert one.bodies == []
    assert (await call(app, "POST", "/v1/completions", b'{"model":"two"}', key="some")).body == b"two"
    listed = json.loads((await call(app, "GET", "/v1/models", key="some")).body)
    assert [card["id"] for card in listed["data"]] == ["two"]


@pytest.mark.parametrize(
    ("body", "model"),
    [
        (b'{"model":"a"}', "a"),
        (b'{"model":null}', None),
        (b"{}", None),
        (b'{"model":3}', None),
        (b"[]", None),
        (b"\xff\xfe", None),
        (b'{"a":' * 5000, None),
        (b'{"messages":[{"content":"\\"model\\":\\"x\\""}],"model":"y"}', "y"),
    ],
)
def test_the_model_of_a_body(body: bytes, model: str | None) -> None:
    assert model_of(body) == model


async def through_guard(*messages: Message, retry_after_s: float | None = None) -> Exchange:
    exchange = Exchange()
    guard = GuardedSend(exchange.send)
    guard.retry_after_s = retry_after_s
    for message in messages:
        await guard(message)
    return exchange


def start(status: int, headers: list[tuple[bytes, bytes]]) -> Message:
    return {"type": "http.response.start", "status": status, "headers": headers}


def body(content: bytes, more: bool) -> Message:
    return {"type": "http.response.body", "body": content, "more_body": more}


async def test_a_stream_passes_unchanged() -> None:
    messages = [start(200, SSE), body(b"data: {}\n\n", True), body(b'data: {"error"', True), body(b"", False)]
    assert (await through_guard(*messages)).sent == messages


async def test_an_error_before_the_first_token_becomes_the_status() -> None:
    error = {"error": {"message": "full", "type": "Too Many Requests", "param": None, "code": 429}}
    chunk = f"data: {json.dumps(error)}\n\n".encode()
    exchange = await through_guard(
        start(200, SSE), body(chunk, True), body(b"data: [DONE]\n\n", True), body(b"", False), retry_after_s=2.5
    )
    assert exchange.status == 429
    assert json.loads(exchange.body) == error
    assert exchange.headers[b"retry-after"] == b"3"
    assert exchange.headers[b"content-type"] == b"application/json"
    assert exchange.headers[b"content-length"] == str(len(exchange.body)).encode()
    assert [message.get("more_body") for message in exchange.sent] == [None, False]


async def test_a_plain_refusal_gets_retry_after() -> None:
    content = b'{"error":{"message":"full"}}'
    exchange = await through_guard(start(429, []), body(content, False), retry_after_s=4.0)
    assert exchange.headers[b"retry-after"] == b"4"
    assert exchange.body == content


async def test_other_answers_pass_unchanged() -> None:
    messages = [start(200, [(b"content-type", b"application/json")]), body(b"{}", False)]
    assert (await through_guard(*messages)).sent == messages


@pytest.mark.parametrize("order", [1, -1])
async def test_the_key_that_was_checked_is_the_key_that_goes_on(tmp_path: Path, order: int) -> None:
    """A made-up second key would otherwise get a session of its own at the router, and a valid one its limits."""
    app, (one,) = dispatch("one", keys=key_ring(tmp_path / "keys.json", every=None))
    went_on: list[str] = []

    async def note(scope: Any, receive: Any, send: Any) -> None:
        exchange = EXCHANGE.get()
        went_on.append(exchange.secret if exchange is not None else "")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    one.app = note  # type: ignore[method-assign]

    async def post(*headers: tuple[bytes, bytes]) -> int:
        exchange = Exchange()

        async def receive() -> Message:
            return {"type": "http.request", "body": b"{}", "more_body": False}

        scope = {"type": "http", "method": "POST", "path": "/tokenize", "headers": list(headers[::order])}
        await app(scope, receive, exchange.send)
        return exchange.status

    assert await post((b"authorization", b"Bearer every"), (b"x-api-key", b"made-up")) == 401
    assert went_on == []
    assert await post((b"authorization", b"Bearer every"), (b"x-api-key", b"every")) == 200
    assert await post((b"x-api-key", b"every")) == 200
    assert await post((b"authorization", b"Basic abc"), (b"x-api-key", b"every")) == 200
    assert went_on == ["every"] * 3


@pytest.mark.parametrize("path", ["/metrics", "/metrics/", "/metrics/x", "/version", "/version/"])
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_what_operators_read_is_not_at_the_clients_address(path: str, method: str) -> None:
    app, (one,) = dispatch("one")
    assert (await call(app, method, path)).status == 404
    assert one.bodies == []
