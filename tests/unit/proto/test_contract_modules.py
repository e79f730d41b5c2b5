"""Frames, counters and errors: what every process shares."""

from pathlib import Path

import grpc
import numpy as np
import pytest

from megatoken.counters import INDEX, NAMES, CounterWriter, read_counters
from megatoken.errors import HTTP_OF_GRPC, OverloadError, RequestError, grpc_status, status_number
from megatoken.tokens.frames import MalformedFrame, pack, token_columns
from megatoken.v1 import frame_columns_pb2, tokens_pb2


def test_columns_are_the_contract_on_the_wire() -> None:
    contract = tokens_pb2.Frame(stream=[7, 9], count=[2, 1], token=[1, 2, 4_294_967_295])
    columns = frame_columns_pb2.Frame.FromString(contract.SerializeToString())
    stream, count, token = token_columns(columns)
    assert count is not None
    assert (stream.tolist(), count.tolist(), token.tolist()) == ([7, 9], [2, 1], [1, 2, 4_294_967_295])
    again = frame_columns_pb2.Frame(stream=pack(stream), count=pack(count), token=pack(token))
    assert tokens_pb2.Frame.FromString(again.SerializeToString()) == contract


@pytest.mark.parametrize(
    ("stream", "count", "token", "complaint"),
    [
        (b"\0\0\0", b"", b"\0\0\0\0", "whole number"),
        (b"\0" * 8, b"", b"\0" * 4, "2 streams"),
        (b"\0" * 8, b"\0" * 4, b"", "1 counts"),
        (b"\0" * 4, b"\xff" * 4, b"\0" * 4, "add up"),
    ],
)
def test_columns_that_do_not_fit_are_refused(stream: bytes, count: bytes, token: bytes, complaint: str) -> None:
    with pytest.raises(MalformedFrame, match=complaint):
        token_columns(frame_columns_pb2.Frame(stream=stream, count=count, token=token))


def test_counters_outlive_their_writer(tmp_path: Path) -> None:
    path = tmp_path / "counters" / "r1.7.counters"
    writer = CounterWriter(path, {"kind": "worker", "id": "r1", "incarnation": 7})
    writer.totals[INDEX["generated_tokens"]] += 5
    writer.totals[INDEX["busy_us"]] = 2**62
    header, totals = read_counters(path)
    assert header == {"kind": "worker", "id": "r1", "incarnation": 7}
    assert dict(zip(NAMES, totals, strict=True))["generated_tokens"] == 5
    writer.close()
    assert read_counters(path)[1][INDEX["busy_us"]] == 2**62


def test_a_file_that_holds_no_counters_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.counters"
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"x\.counters: not a counter file"):
        read_counters(path)


def test_errors_name_field_value_and_what_is_allowed() -> None:
    error = RequestError("temperature", -1.0, "at least 0")
    assert str(error) == "temperature: -1.0 is not allowed; at least 0"
    assert grpc_status(error) == (grpc.StatusCode.INVALID_ARGUMENT, str(error))
    assert len(str(RequestError("prompt", list(range(9999)), "at most 8192 tokens"))) < 150


def test_an_unknown_exception_keeps_its_text_to_itself() -> None:
    code, text = grpc_status(KeyError("secret prompt"))
    assert code is grpc.StatusCode.INTERNAL
    assert "secret" not in text


def test_every_status_of_ours_has_an_http_code() -> None:
    assert HTTP_OF_GRPC[OverloadError("full", 1.0).grpc_code] == 429
    assert status_number(OverloadError("full", 1.0)) == 8
    assert np.uint32(status_number(RequestError("n", 0, "at least 1"))) == 3
