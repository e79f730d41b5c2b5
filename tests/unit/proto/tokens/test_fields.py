"""Fields of a message are counted as a decoder would find them, up to a bound and without holding up the loop."""

from __future__ import annotations

import asyncio

import pytest

from megatoken.tokens.fields import FIELDS_AT_ONCE, fields_at_most

SHAPES = {
    "varint": b"\x08\x01",
    "long varint": b"\x08\x80\x80\x01",
    "long tag": b"\x88\x80\x01\x05",
    "fixed64": b"\x09" + b"\xff" * 8,
    "fixed32": b"\x0d" + b"\xff" * 4,
    "empty": b"\x0a\x00",
    "short": b"\x0a\x03abc",
    "long": b"\x0a\xc8\x01" + b"\x08" * 200,
    "longer": b"\x0a\x88\x82\x01" + b"\x08" * 16648,
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 2, 3, 10])
async def test_each_kind_of_field_is_counted_once(shape: str, count: int) -> None:
    message = SHAPES[shape] * count
    assert not await fields_at_most(message, count - 1)
    assert await fields_at_most(message, count)


async def test_fields_of_all_kinds_are_counted_together() -> None:
    message = b"".join(SHAPES.values())
    assert not await fields_at_most(message, len(SHAPES) - 1)
    assert await fields_at_most(message, len(SHAPES))


@pytest.mark.parametrize("message", [b"", b"\x08", b"\xff\xff\xff"])
async def test_too_short_for_more_is_not_looked_at(message: bytes) -> None:
    assert await fields_at_most(message, len(message) // 2)


@pytest.mark.parametrize(
    "broken",
    [
        b"\x0b" + b"\x08\x01" * 9,
        b"\x0c" + b"\x08\x01" * 9,
        b"\x0e" * 19,
        b"\x0f" * 19,
        b"\xff" * 19,
        b"\x0a" + b"\xff" * 18,
    ],
    ids=["group", "end of group", "kind 6", "kind 7", "endless tag", "endless length"],
)
async def test_bytes_that_are_no_message_are_one_field_at_most(broken: bytes) -> None:
    assert await fields_at_most(broken, 1)
    assert not await fields_at_most(b"\x08\x01" + broken, 1)
    assert await fields_at_most(b"\x08\x01" + broken, 2)


@pytest.mark.parametrize(
    ("fields", "turns"), [(FIELDS_AT_ONCE - 1, 0), (FIELDS_AT_ONCE, 1), (2 * FIELDS_AT_ONCE, 2), (5000, 4)]
)
async def test_others_have_their_turn_every_so_many_fields(
    fields: int, turns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    assert await fields_at_most(b"\x0d\x00\x00\x00\x00" * fields, fields)
    assert slept == [0] * turns
