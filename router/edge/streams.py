"""Which stream number of the edge's session carries which request.

Numbers are reused only after the request's Finish arrived, so a late token of an aborted request can never be taken for
another's. Pure state; the owner is the engine-core stand-in in vllm_layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, TypeVar

from megatoken.errors import OverloadError

Request = TypeVar("Request")


@dataclass(slots=True)
class Streams(Generic[Request]):
    """Two-way table of stream numbers and requests, with a bound."""

    limit: int
    by_stream: dict[int, Request] = field(default_factory=dict)
    by_request: dict[str, int] = field(default_factory=dict)
    free: list[int] = field(default_factory=list)
    closing: set[int] = field(default_factory=set)  # cancelled, Finish still to come
    next_number: int = 0

    def open(self, request_id: str, request: Request) -> int:
        """A number for a new request. Raises OverloadError at the bound."""
        if len(self.by_stream) + len(self.closing) >= self.limit:
            raise OverloadError(f"this edge has {self.limit} requests running; retry after 1 s", retry_after_s=1.0)
        if self.free:
            number = self.free.pop()
        else:
            number = self.next_number
            self.next_number += 1
        self.by_stream[number] = request
        self.by_request[request_id] = number
        return number

    def cancel(self, request_id: str) -> int | None:
        """Forgets a running request and returns its number, which waits for the Finish; None when it is unknown."""
        number = self.by_request.pop(request_id, None)
        if number is not None:
            del self.by_stream[number]
            self.closing.add(number)
        return number

    def finish(self, number: int, request_id: str | None) -> None:
        """The Finish of a number arrived: it may be used again. `request_id` is None for a cancelled one."""
        if request_id is not None:
            del self.by_request[request_id]
            del self.by_stream[number]
        elif number in self.closing:
            self.closing.remove(number)
        else:
            return  # a Finish for a number that is not ours: nothing to free
        self.free.append(number)

    def lose_all(self) -> list[Request]:
        """The session broke: every running request, oldest first; all numbers are free again."""
        lost = list(self.by_stream.values())
        self.by_stream.clear()
        self.by_request.clear()
        self.closing.clear()
        self.free.clear()
        self.next_number = 0
        return lost
