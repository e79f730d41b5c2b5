"""Channels that show a credential with every call.

gRPC's own way, call credentials, needs TLS, and client interceptors cost a queue per message of a stream. So the
callables that stubs make are wrapped: one more metadata entry a call, nothing per message.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatoken.access.files import Metadata

Present = Callable[[], Metadata]


class PresentingChannel:
    """A grpc or grpc.aio channel whose calls carry what `present()` returns at that moment."""

    def __init__(self, channel: Any, present: Present) -> None:
        self._channel, self._present = channel, present

    def unary_unary(self, *arguments: Any, **named: Any) -> Any:
        return _presenting(self._channel.unary_unary(*arguments, **named), self._present)

    def unary_stream(self, *arguments: Any, **named: Any) -> Any:
        return _presenting(self._channel.unary_stream(*arguments, **named), self._present)

    def stream_unary(self, *arguments: Any, **named: Any) -> Any:
        return _presenting(self._channel.stream_unary(*arguments, **named), self._present)

    def stream_stream(self, *arguments: Any, **named: Any) -> Any:
        return _presenting(self._channel.stream_stream(*arguments, **named), self._present)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._channel, name)

    def __enter__(self) -> PresentingChannel:
        self._channel.__enter__()
        return self

    def __exit__(self, *problem: Any) -> Any:
        return self._channel.__exit__(*problem)

    async def __aenter__(self) -> PresentingChannel:
        await self._channel.__aenter__()
        return self

    async def __aexit__(self, *problem: Any) -> Any:
        return await self._channel.__aexit__(*problem)


def presenting(channel: Any, present: Present | None) -> Any:
    """The channel, showing a credential when there is one to show."""
    return channel if present is None else PresentingChannel(channel, present)


def _presenting(call: Callable[..., Any], present: Present) -> Callable[..., Any]:
    def start(*arguments: Any, metadata: Any = None, **named: Any) -> Any:
        return call(*arguments, metadata=(*(metadata or ()), *present()), **named)

    return start
