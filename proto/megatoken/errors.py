"""The errors that cross a process boundary, and the one table to gRPC status and HTTP code.

MegatokenError
├── RequestError      the caller's fault; the same request fails again     INVALID_ARGUMENT   400
│   └── NotFoundError what it names does not exist                         NOT_FOUND          404
├── AuthError         no key, or one that is not allowed this              UNAUTHENTICATED    401
├── ForbiddenError    known, and not allowed this                          PERMISSION_DENIED  403
├── OverloadError     the system is full; the same request may pass later  RESOURCE_EXHAUSTED 429
├── DeadlineError     its deadline passed, or cannot be met                DEADLINE_EXCEEDED  504
├── UnavailableError  this replica or router cannot; another may           UNAVAILABLE        503
│   └── DrainingError it takes no new requests; what it has goes on        UNAVAILABLE        503
└── EngineDeadError   the engine behind a replica is gone: replace it      UNAVAILABLE        503
"""

from __future__ import annotations

import grpc


class MegatokenError(Exception):
    """Root of the tree; never raised itself."""

    grpc_code = grpc.StatusCode.INTERNAL
    http_code = 500


class RequestError(MegatokenError):
    """The request is wrong. Says which field, the value it had, and what is allowed."""

    grpc_code = grpc.StatusCode.INVALID_ARGUMENT
    http_code = 400

    def __init__(self, field: str, value: object, allowed: str) -> None:
        self.field = field
        self.value = value
        self.allowed = allowed
        shown = repr(value)
        if len(shown) > 80:  # a long prompt must not become a long message; of a long path the end tells most
            shown = f"{shown[:38]}...{shown[-39:]}"
        super().__init__(f"{field}: {shown} is not allowed; {allowed}")


class NotFoundError(RequestError):
    """What the request names does not exist, e.g. an unknown model."""

    grpc_code = grpc.StatusCode.NOT_FOUND
    http_code = 404


class AuthError(MegatokenError):
    """No key, an unknown key, or a key that is not allowed what it asked for."""

    grpc_code = grpc.StatusCode.UNAUTHENTICATED
    http_code = 401


class ForbiddenError(MegatokenError):
    """The caller is known, and what it asks is for others."""

    grpc_code = grpc.StatusCode.PERMISSION_DENIED
    http_code = 403


class OverloadError(MegatokenError):
    """The system is full. `retry_after_s` is when a place is likely."""

    grpc_code = grpc.StatusCode.RESOURCE_EXHAUSTED
    http_code = 429

    def __init__(self, message: str, retry_after_s: float) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message)


class DeadlineError(MegatokenError):
    """The deadline passed, or admission saw that it cannot be met."""

    grpc_code = grpc.StatusCode.DEADLINE_EXCEEDED
    http_code = 504


class UnavailableError(MegatokenError):
    """This replica or router cannot serve now; another may."""

    grpc_code = grpc.StatusCode.UNAVAILABLE
    http_code = 503


class DrainingError(UnavailableError):
    """This replica or router takes no new requests; what it has goes on."""


class EngineDeadError(MegatokenError):
    """The engine behind a replica is gone. The replica must be replaced."""

    grpc_code = grpc.StatusCode.UNAVAILABLE
    http_code = 503


RETRY_AFTER_KEY = "retry-after-ms"  # trailing metadata beside RESOURCE_EXHAUSTED

HTTP_OF_GRPC: dict[grpc.StatusCode, int] = {
    kind.grpc_code: kind.http_code
    for kind in (RequestError, NotFoundError, AuthError, ForbiddenError, OverloadError, DeadlineError, UnavailableError)
}


def grpc_status(error: BaseException) -> tuple[grpc.StatusCode, str]:
    """The gRPC status for an exception: INTERNAL, without its text, for any that is not ours."""
    if isinstance(error, MegatokenError):
        return error.grpc_code, str(error)
    return grpc.StatusCode.INTERNAL, f"internal error ({type(error).__name__})"


def status_number(error: BaseException) -> int:
    """The numeric gRPC status code, as Finish.code carries it."""
    number: int = grpc_status(error)[0].value[0]
    return number
