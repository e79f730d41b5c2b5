"""Which stream number of the edge's session carries which request.

A cancelled request is forgotten at once, but counts as running until its Finish arrives: until then the fleet still
works on it. Pure state; owned by session.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, TypeVar

Request = TypeVar("Request")


@dataclass(slots=True)
class Streams(Generic[Request]):
    """Two-way table of stream numbers and requests."""

    by_stream: dict[int, Request] = field(default_factory=dict)
    by_request: dict[str, int] = field(default_factory=dict)
    closing: set[int] = field(default_factory=set)  # cancelled, Finish still to come

    def __len__(self) -> int:
        return len(self.by_stream) + len(self.closing)

    def add(self, number: int, request_id: str, request: Request) -> None:
        """A request was sent under a number that no other of this session has had."""
        self.by_stream[number] = request
        self.by_request[request_id] = number

    def cancel(self, request_id: str) -> int | None:
        """Forgets a running request and returns its number; None when it is unknown."""
        number = self.by_request.pop(request_id, None)
        if number is not None:
            del self.by_stream[number]
            self.closing.add(number)
        return number

    def finish(self, number: int, request_id: str | None) -> None:
        """The Finish of a number arrived. `request_id` is None for a cancelled one."""
        if request_id is None:
            self.closing.discard(number)
        else:
            del self.by_request[request_id]
            del self.by_stream[number]
