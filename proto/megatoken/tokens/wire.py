"""Protobuf bytes put together by hand where a message object would cost a copy or a decode.

Only what the router sends often: a Start around an already encoded request, a packed column, a number. Tests hold
these to the generated code.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Final

from megatoken.errors import RequestError

_U32: Final = struct.Struct("<I")

TAG_CLIENT_CANCEL: Final = b"\x12"  # ClientFrame.cancel = 2, packed
TAG_FRAME_STREAM: Final = b"\x0a"  # Frame.stream = 1, packed
TAG_FRAME_COUNT: Final = b"\x12"
TAG_FRAME_TOKEN: Final = b"\x1a"
TAG_FRAME_DETAIL: Final = b"\x22"
TAG_FRAME_FINISH: Final = b"\x2a"

SESSION_TAKEN: Final = ("megatoken-session", "taken")  # initial metadata of a Session that is served
MAX_REQUEST_BYTES: Final = 8 << 20  # an encoded GenerateRequest; a prompt of a million tokens has half of it


def too_large(size: int, most: int) -> RequestError:
    """One request that no message of a session could hold beside others: it is refused, and touches nobody else's."""
    return RequestError("request", f"{size} bytes", f"at most {most} bytes, prompt, schema and cache_salt included")


def varint(value: int) -> bytes:
    """Base-128 encoding of a number >= 0."""
    if value < 0x80:
        return bytes((value,))
    parts = bytearray()
    while value >= 0x80:
        parts.append((value & 0x7F) | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)


def delimited(tag: bytes, content: bytes) -> bytes:
    """A length-delimited field; nothing when it is empty, as proto3 has it."""
    return tag + varint(len(content)) + content if content else b""


def start(stream: int, request: bytes) -> bytes:
    """ClientFrame.start of one encoded GenerateRequest."""
    length = varint(len(request))
    total = 5 + 1 + len(length) + len(request)
    return b"".join((b"\x0a", varint(total), b"\x0d", _U32.pack(stream), b"\x12", length, request))


def cancel(streams: Iterable[int]) -> bytes:
    """ClientFrame.cancel."""
    return delimited(TAG_CLIENT_CANCEL, b"".join(map(_U32.pack, streams)))


def finish_of(stream: int, finish: bytes) -> bytes:
    """An encoded Finish of no stream as one of `stream`. Fields may come in any order, and the last one counts."""
    return finish + b"\x0d" + _U32.pack(stream)
