"""How many fields an encoded message has, before a decoder makes an object of each: 16 MiB can hold millions."""

from __future__ import annotations

import asyncio
from typing import Final

FIELDS_AT_ONCE: Final = 1024  # counted before the loop's others have their turn: some 2 ms


async def fields_at_most(message: bytes, most: int) -> bool:
    """Whether an encoded message has at most so many fields of its own. Stops at bytes that are no message.

    A message too short for more is not looked at; a long one is counted with turns for the loop's other tasks between.
    """
    if len(message) // 2 <= most:  # no field is shorter than two bytes
        return True
    at, end, count = 0, len(message), 0
    while at < end:
        count += 1
        if count > most:
            return False
        at = _after_field(message, at)
        if count % FIELDS_AT_ONCE == 0:
            await asyncio.sleep(0)
    return True


def _after_field(message: bytes, at: int) -> int:
    """Where the field that begins at `at` ends, or the message's end where it is no field."""
    try:
        tag, at = _read_varint(message, at)
        kind = tag & 7
        if kind == 2:
            length, at = _read_varint(message, at)
            return at + length
        if kind == 0:
            return _read_varint(message, at)[1]
        return at + {1: 8, 5: 4}[kind]
    except (IndexError, KeyError):
        return len(message)


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while message[at] & 0x80:
        value |= (message[at] & 0x7F) << shift
        shift += 7
        at += 1
    return value | message[at] << shift, at + 1
