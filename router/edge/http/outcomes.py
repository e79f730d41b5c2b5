"""Says how a stream of the router ended, in the terms that vLLM's serving layer has for it.

Pure: a Finish of the contract in, a Refusal or a vLLM finish reason out. vllm.layer raises the Refusal as the exception
that vLLM's own error handlers turn into that HTTP status.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from megatoken.errors import MegatokenError, OverloadError
from megatoken.v1.tokens_pb2 import (
    FINISH_REASON_CANCELLED,
    FINISH_REASON_ERROR,
    FINISH_REASON_LENGTH,
    FINISH_REASON_REPETITION,
    FINISH_REASON_STOP,
    Finish,
)

# vllm.v1.engine.FinishReason by name; a contract test compares the names.
VLLM_REASON: Final = {
    FINISH_REASON_STOP: "STOP",
    FINISH_REASON_LENGTH: "LENGTH",
    FINISH_REASON_CANCELLED: "ABORT",
    FINISH_REASON_REPETITION: "REPETITION",
}
REPETITION_STOP_REASON: Final = "repetition_detected"  # vllm.v1.core.sched.utils.check_stop

# gRPC status numbers that a Finish carries, and the HTTP status each becomes (megatoken.errors has the table of types).
HTTP_OF_CODE: Final = {1: 503, 3: 400, 4: 504, 5: 404, 7: 403, 8: 429, 9: 400, 11: 400, 12: 501, 14: 503, 16: 401}
RETRIED: Final = (429, 503)  # statuses after which the same request may pass later
DEFAULT_RETRY_AFTER_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request failed, for the client that sent it."""

    http_status: int
    message: str
    retry_after_s: float | None = None


def refusal(finish: Finish) -> Refusal | None:
    """The refusal that a finish stands for; None when the request ended as it should."""
    if finish.reason in VLLM_REASON:
        return None
    if finish.reason != FINISH_REASON_ERROR:
        return Refusal(500, f"the router ended the request for an unknown reason ({finish.reason})")
    message = finish.message or f"the request failed with gRPC status {finish.code}"
    return _refusal(HTTP_OF_CODE.get(finish.code, 500), message, finish.retry_after_ms / 1000)


def refusal_of(error: MegatokenError) -> Refusal:
    """The refusal that one of our own errors stands for, where the edge itself refuses."""
    retry_after_s = error.retry_after_s if isinstance(error, OverloadError) else 0.0
    return _refusal(error.http_code, str(error), retry_after_s)


def _refusal(status: int, message: str, retry_after_s: float) -> Refusal:
    if status not in RETRIED:
        return Refusal(status, message)
    retry_after_s = retry_after_s or DEFAULT_RETRY_AFTER_S
    if status == 429:
        message = f"{message.rstrip('.')}; retry after {retry_after_s:g} s"
    return Refusal(status, message, retry_after_s)


def stop_reason(finish: Finish) -> int | str | None:
    """vLLM's stop_reason: the stop token that ended the request, if it was one that the request named."""
    if finish.reason == FINISH_REASON_REPETITION:
        return REPETITION_STOP_REASON
    return finish.stop_token if finish.HasField("stop_token") else None


def retry_after_headers(status: int, retry_after_s: float | None) -> list[tuple[bytes, bytes]]:
    """Retry-After, in whole seconds as HTTP has it and in milliseconds as the openai client reads it."""
    if status not in RETRIED:
        return []
    retry_after_s = retry_after_s or DEFAULT_RETRY_AFTER_S
    return [
        (b"retry-after", str(max(1, math.ceil(retry_after_s))).encode()),
        (b"retry-after-ms", str(max(1, round(retry_after_s * 1000))).encode()),
    ]
