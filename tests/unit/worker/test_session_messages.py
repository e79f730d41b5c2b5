"""One message of a session is taken in pieces: the worker's other callers have their turn between them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from megatoken.tokens import wire
from megatoken.v1.frame_columns_pb2 import ClientFrame
from megatoken.worker.tokens_service import CANCELS_AT_ONCE, END, _read_session


class Cancelled:
    """A replica that notes which of another task's turns each cancelled number came in."""

    def __init__(self) -> None:
        self.turn = 0
        self.turns: dict[int, int] = {}

    def cancel(self, _outlet: Any, numbers: Sequence[int]) -> None:
        self.turns.update((number, self.turn) for number in numbers)

    async def another_caller(self) -> None:
        while True:
            await asyncio.sleep(0)
            self.turn += 1


class Context:
    def __init__(self, *messages: bytes) -> None:
        self.messages = list(messages)

    async def read(self) -> Any:
        return self.messages.pop(0) if self.messages else END


async def test_a_message_of_many_cancels_is_taken_in_pieces_and_whole() -> None:
    replica: Any = Cancelled()
    count = CANCELS_AT_ONCE * 20 + 1
    other = asyncio.create_task(replica.another_caller())
    outlet: Any = None
    await _read_session(replica, outlet, Context(wire.cancel(range(count)), ClientFrame().SerializeToString()))
    other.cancel()
    assert list(replica.turns) == list(range(count))
    assert len(set(replica.turns.values())) >= 20
