"""What is put together by hand is what the generated code writes and reads."""

from __future__ import annotations

import pytest

from megatoken.tokens import wire
from megatoken.v1.tokens_pb2 import ClientFrame, Finish, GenerateRequest


@pytest.mark.parametrize(
    ("value", "encoded"),
    [
        (0, "00"),
        (1, "01"),
        (127, "7f"),
        (128, "8001"),
        (129, "8101"),
        (255, "ff01"),
        (300, "ac02"),
        (16383, "ff7f"),
        (16384, "808001"),
        (2**32, "8080808010"),
        (2**63, "80808080808080808001"),
    ],
)
def test_a_number_is_seven_bits_a_byte_the_lowest_first(value: int, encoded: str) -> None:
    assert wire.varint(value).hex() == encoded


def test_an_empty_field_is_not_written() -> None:
    assert wire.delimited(b"\x12", b"") == b""
    assert wire.delimited(b"\x12", b"ab") == b"\x12\x02ab"
    assert wire.delimited(b"\x12", bytes(200)) == b"\x12\xc8\x01" + bytes(200)


@pytest.mark.parametrize("stream", [0, 1, 2**32 - 1])
@pytest.mark.parametrize("size", [0, 1, 100, 117, 118, 119, 127, 128, 16_000, 16_400, 70_000])
def test_a_start_is_read_back(stream: int, size: int) -> None:
    request = GenerateRequest(model="m", cache_salt="s" * size)
    frame = ClientFrame.FromString(wire.start(stream, request.SerializeToString()))
    assert [(one.stream, one.request) for one in frame.start] == [(stream, request)]


@pytest.mark.parametrize("streams", [[], [7], [1, 2**32 - 1], list(range(100))])
def test_cancels_are_read_back(streams: list[int]) -> None:
    encoded = wire.cancel(streams)
    assert list(ClientFrame.FromString(encoded).cancel) == streams
    assert encoded == ClientFrame(cancel=streams).SerializeToString()


@pytest.mark.parametrize("stream", [0, 5, 2**32 - 1])
def test_an_end_is_given_its_stream(stream: int) -> None:
    finish = Finish(stream=9, reason=2)
    found = Finish.FromString(wire.finish_of(stream, finish.SerializeToString()))
    assert (found.stream, found.reason) == (stream, 2)


def test_a_request_that_is_too_large_is_refused_by_its_size() -> None:
    assert str(wire.too_large(9, 8)) == (
        "request: '9 bytes' is not allowed; at most 8 bytes, prompt, schema and cache_salt included"
    )
