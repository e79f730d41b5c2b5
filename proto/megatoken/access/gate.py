"""The server interceptor that enforces the table: every call of every program passes it, and default is no.

A caller is who its token says (metadata METADATA_KEY), and under mutual TLS also who its certificate's roles say. The
identities CLIENT and LEASE are shown otherwise: API keys are asked for through `is_client`, leases stand in the
requests themselves and are checked by the worker's Tokens service.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, Final, TypeAlias

import grpc
import grpc.aio

from megatoken.access.credentials import METADATA_KEY
from megatoken.access.files import CredentialsFile
from megatoken.access.table import Callers, Identity, Program, callers_of
from megatoken.errors import AuthError, ForbiddenError, MegatokenError, grpc_status

ROLE_URI: Final = b"megatoken://role/"  # + an identity, as a URI in the certificate's subject alternative names
ROLES_OF_CERTIFICATES: Final = {
    identity.value.encode(): identity
    for identity in (Identity.OPERATOR, Identity.CONTROLLER, Identity.ROUTER, Identity.WORKER, Identity.AGENT)
}
CallMetadata: TypeAlias = Iterable[tuple[str, str | bytes]]


class Gate(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Of one server. `is_client(metadata)` returns, or raises AuthError; unset, nobody is a client."""

    def __init__(
        self,
        program: Program,
        credentials: CredentialsFile,
        is_client: Callable[[CallMetadata], object] | None = None,
        *,
        certificates: bool = False,
    ) -> None:
        self._program, self._credentials, self._is_client = program, credentials, is_client
        self._certificates = certificates

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        """The method's handler, or one that refuses."""
        handler = await continuation(details)
        if handler is None:
            return None  # no such method: gRPC says so
        allowed = callers_of(self._program, details.method)
        metadata = details.invocation_metadata
        error = self._refusal(details.method, allowed, metadata)
        if error is None:
            return handler
        if self._certificates:
            return _handler_like(handler, lambda serve: _by_certificate(serve, allowed, error))
        return _handler_like(handler, lambda _serve: _refusing(error), raw=True)

    def identities(self, context: Any) -> frozenset[Identity]:
        """Whom a call comes from, by token and certificate; for services that treat callers differently."""
        shown = self._identity(context.invocation_metadata())
        found = roles_of(context) if self._certificates else frozenset[Identity]()
        return found if shown is None else found | {shown}

    def _refusal(self, method: str, allowed: Callers, metadata: CallMetadata) -> MegatokenError | None:
        """Why the call is refused, as far as its metadata tells; None: it may pass."""
        if Identity.ANYONE in allowed or Identity.LEASE in allowed:
            return None
        shown = self._identity(metadata)
        if shown in allowed:
            return None
        if Identity.CLIENT in allowed and self._is_client is not None:
            try:
                self._is_client(metadata)
            except AuthError as error:
                return error
            return None
        who = " or ".join(sorted(allowed)) or "nobody"
        if shown is not None:
            return ForbiddenError(f"{method} is for {who}; this call comes from {shown}")
        return AuthError(f"{method} is for {who}; this call shows no valid {METADATA_KEY}")

    def _identity(self, metadata: CallMetadata) -> Identity | None:
        shown = [value for name, value in metadata or () if name == METADATA_KEY]
        if len(shown) != 1 or not isinstance(shown[0], str):  # two are one too many to say who it is
            return None
        return self._credentials.identify(shown[0])


def roles_of(context: Any) -> frozenset[Identity]:
    """The roles in the caller's certificate, which the server's authority signed."""
    names = context.auth_context().get("x509_subject_alternative_name", ())
    roles = (bytes(name)[len(ROLE_URI) :] for name in names if bytes(name).startswith(ROLE_URI))
    return frozenset(ROLES_OF_CERTIFICATES[role] for role in roles if role in ROLES_OF_CERTIFICATES)


def _by_certificate(serve: Any, allowed: Callers, error: MegatokenError) -> Any:
    """Serves callers whose certificate has an allowed role. Of the same kind as `serve`: grpc.aio tells by that."""
    if inspect.isasyncgenfunction(serve):

        async def stream(request: Any, context: Any) -> Any:
            if not roles_of(context) & allowed:
                await _refuse(context, error)
            async for message in serve(request, context):
                yield message

        return stream

    async def answer(request: Any, context: Any) -> Any:
        if not roles_of(context) & allowed:
            await _refuse(context, error)
        return await serve(request, context)

    return answer


def _refusing(error: MegatokenError) -> Any:
    async def refuse(_request: Any, context: Any) -> None:
        await _refuse(context, error)

    return refuse


async def _refuse(context: Any, error: MegatokenError) -> None:
    await context.abort(*grpc_status(error))


def _handler_like(handler: Any, wrap: Callable[[Any], Any], *, raw: bool = False) -> Any:
    """A handler of the same kind around another function; `raw`: messages are not even decoded."""
    kinds = {
        (False, False): (grpc.unary_unary_rpc_method_handler, handler.unary_unary),
        (False, True): (grpc.unary_stream_rpc_method_handler, handler.unary_stream),
        (True, False): (grpc.stream_unary_rpc_method_handler, handler.stream_unary),
        (True, True): (grpc.stream_stream_rpc_method_handler, handler.stream_stream),
    }
    make, serve = kinds[handler.request_streaming, handler.response_streaming]
    if raw:
        return make(wrap(serve))
    return make(wrap(serve), handler.request_deserializer, handler.response_serializer)
