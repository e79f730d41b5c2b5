"""How the end of a stream becomes a finish reason or an HTTP status."""

from __future__ import annotations

from http import HTTPStatus

import grpc
import pytest

from megatoken.errors import HTTP_OF_GRPC, AuthError, OverloadError, UnavailableError
from megatoken.router.edge.http.outcomes import (
    HTTP_OF_CODE,
    Refusal,
    refusal,
    refusal_of,
    retry_after_headers,
    stop_reason,
)
from megatoken.v1.tokens_pb2 import (
    FINISH_REASON_CANCELLED,
    FINISH_REASON_ERROR,
    FINISH_REASON_LENGTH,
    FINISH_REASON_REPETITION,
    FINISH_REASON_STOP,
    Finish,
)


@pytest.mark.parametrize(
    "reason", [FINISH_REASON_STOP, FINISH_REASON_LENGTH, FINISH_REASON_CANCELLED, FINISH_REASON_REPETITION]
)
def test_a_normal_end_is_no_refusal(reason: int) -> None:
    assert refusal(Finish(reason=reason)) is None


@pytest.mark.parametrize(
    ("code", "status"), [(3, 400), (4, 504), (5, 404), (8, 429), (14, 503), (16, 401), (13, 500), (0, 500), (77, 500)]
)
def test_an_error_has_the_status_of_its_code(code: int, status: int) -> None:
    refused = refusal(Finish(reason=FINISH_REASON_ERROR, code=code, message="why"))
    assert refused is not None
    assert refused.http_status == status
    assert refused.message.startswith("why")


def test_every_code_of_the_error_tree_has_the_trees_status() -> None:
    for code, status in HTTP_OF_GRPC.items():
        assert isinstance(code, grpc.StatusCode)
        assert HTTP_OF_CODE[code.value[0]] == status


def test_every_status_is_one_of_http() -> None:
    assert {HTTPStatus(status) for status in HTTP_OF_CODE.values()}


def test_overload_says_when_to_come_back() -> None:
    refused = refusal(Finish(reason=FINISH_REASON_ERROR, code=8, message="the queue is full.", retry_after_ms=2500))
    assert refused is not None
    assert refused.message == "the queue is full; retry after 2.5 s"
    assert refused.retry_after_s == 2.5
    assert retry_after_headers(429, refused.retry_after_s) == [(b"retry-after", b"3"), (b"retry-after-ms", b"2500")]


def test_an_error_of_the_edge_itself_is_refused_alike() -> None:
    assert refusal_of(OverloadError("full", 0.25)) == Refusal(429, "full; retry after 0.25 s", 0.25)
    assert refusal_of(UnavailableError("no router answers")) == Refusal(503, "no router answers", 1.0)
    assert refusal_of(AuthError("no key")) == Refusal(401, "no key", None)


def test_an_unspecified_end_is_our_fault() -> None:
    refused = refusal(Finish())
    assert refused is not None
    assert refused.http_status == 500


def test_stop_reasons() -> None:
    assert stop_reason(Finish(reason=FINISH_REASON_STOP)) is None
    assert stop_reason(Finish(reason=FINISH_REASON_STOP, stop_token=0)) == 0
    assert stop_reason(Finish(reason=FINISH_REASON_REPETITION)) == "repetition_detected"


def test_other_statuses_have_no_retry_after() -> None:
    assert retry_after_headers(400, 3.0) == []
