"""The bounded history of what happened, and those who follow it. Lives in the controller's event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable

from megatoken.cluster.decide.fleet import ClusterEvent
from megatoken.v1.control_pb2 import Event


class EventLog:
    """Numbers events from 1 and keeps the last `kept`; a follower that is slow misses those that fell out."""

    def __init__(self, kept: int, clock: Callable[[], float]) -> None:
        self._events: deque[Event] = deque(maxlen=kept)
        self._sequence = 0
        self._clock = clock
        self._grown = asyncio.Condition()
        self._closed = False

    def add(self, event: ClusterEvent) -> Event:
        """Records an event; followers see it after the next `publish`."""
        self._sequence += 1
        numbered = Event(
            sequence=self._sequence,
            unix_s=self._clock(),
            kind=event.kind,
            subject=event.subject,
            message=event.message,
            cause=event.cause,
            fields=dict(event.fields),
        )
        self._events.append(numbered)
        return numbered

    async def publish(self, *, closed: bool = False) -> None:
        """Wakes followers; with `closed` their streams end."""
        self._closed = self._closed or closed
        async with self._grown:
            self._grown.notify_all()

    async def read(self, after: int, *, follow: bool) -> AsyncIterator[Event]:
        """Events after a sequence number, then new ones while `follow` is set."""
        while True:
            for event in [event for event in self._events if event.sequence > after]:
                after = event.sequence
                yield event
            if not follow or self._closed:
                return
            async with self._grown:
                while self._sequence <= after and not self._closed:
                    await self._grown.wait()
