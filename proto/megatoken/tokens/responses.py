"""What waits to be written to one Generate call: tokens, details and ends by choice, as few messages as fit. Pure."""

from __future__ import annotations

from typing import Final

from megatoken.tokens.outbox import MAX_FRAME_BYTES
from megatoken.tokens.pieces import pieces_of, token_rows
from megatoken.v1.frame_columns_pb2 import GenerateResponse
from megatoken.v1.tokens_pb2 import Detail, Finish

_TOKEN_BYTES: Final = 4


class WaitingResponses:
    """Choices come out in the order in which something was first added of them; a choice's end in its last message."""

    def __init__(self) -> None:
        self._tokens: dict[int, list[bytes]] = {}  # of each choice that waits, and be it for its end alone
        self._details: dict[int, list[bytes]] = {}
        self._finishes: dict[int, Finish] = {}

    def __bool__(self) -> bool:
        return bool(self._tokens)

    def add(self, choice: int, packed: bytes, details: list[bytes]) -> None:
        """Tokens as a packed column, and encoded Details that belong to them."""
        self._tokens.setdefault(choice, []).append(packed)
        if details:
            self._details.setdefault(choice, []).extend(details)

    def finish(self, choice: int, finish: Finish) -> None:
        """The choice's end, which is taken over."""
        finish.stream = 0
        self._tokens.setdefault(choice, [])
        self._finishes[choice] = finish

    def take(self) -> bytes:
        """One encoded GenerateResponse; call again while something waits."""
        choice = next(iter(self._tokens))
        packed, details = b"".join(self._tokens.pop(choice)), self._details.pop(choice, [])
        if len(packed) + sum(map(len, details)) > MAX_FRAME_BYTES:
            packed, details = self._first(choice, packed, details)
        message = GenerateResponse(tokens=packed, choice=choice)
        for encoded in details:
            detail = Detail.FromString(encoded)
            detail.stream = 0
            message.detail.MergeFrom(detail)
        if choice not in self._tokens and (finish := self._finishes.pop(choice, None)) is not None:
            message.finish.CopyFrom(finish)
        taken: bytes = message.SerializeToString()
        return taken

    def _first(self, choice: int, packed: bytes, details: list[bytes]) -> tuple[bytes, list[bytes]]:
        """(tokens, details) that fit one message; what follows them waits again."""
        pieces = [piece for encoded in details for kind in pieces_of(encoded) for piece in kind]
        taken, size, rows = 0, 0, 0
        for piece in pieces:
            if taken and size + len(piece) > MAX_FRAME_BYTES:
                break
            taken, size, rows = taken + 1, size + len(piece), rows + token_rows(piece)
        end = _TOKEN_BYTES * rows if taken < len(pieces) else min(len(packed), MAX_FRAME_BYTES)
        if taken < len(pieces) or end < len(packed):
            self._tokens[choice] = [packed[end:]]
            self._details[choice] = pieces[taken:]
        return packed[:end], pieces[:taken]
