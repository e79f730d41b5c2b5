"""What a session client puts into one message."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from megatoken.router.client import session as module
from megatoken.router.client.session import SessionClient
from megatoken.tokens import wire


def client() -> SessionClient:
    channel: Any = SimpleNamespace(stream_stream=lambda _method: lambda metadata: SimpleNamespace(metadata=metadata))
    return SessionClient(channel)


async def test_cancels_follow_all_starts_and_go_once(monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "MAX_BATCH_BYTES", len(wire.start(1, b"first")))
    session = client()
    session.start(1, b"first")
    session.start(2, b"second")
    session.cancel((1, 2))
    assert session._take() == wire.start(1, b"first")
    assert session._take() == wire.start(2, b"second") + wire.cancel([1, 2])
    assert session._take() == b""
