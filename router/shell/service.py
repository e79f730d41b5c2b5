"""The gRPC services of a router, as raw-bytes handlers where tokens pass, and generated ones elsewhere."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from megatoken.access.gate import CallMetadata
from megatoken.errors import MegatokenError
from megatoken.router.config import RouterConfig
from megatoken.router.core.state import RouterState
from megatoken.router.shell.calls.client_session import ClientSession
from megatoken.router.shell.calls.cork import Corks
from megatoken.router.shell.calls.generate import refuse, serve_generate
from megatoken.router.shell.calls.leases import serve_leases
from megatoken.router.shell.leases import IssuedLeases
from megatoken.router.shell.status import models, router_status
from megatoken.v1 import router_pb2, router_pb2_grpc


def tokens_handler(state: RouterState, config: RouterConfig) -> Any:
    """megatoken.v1.Tokens without serializers: messages arrive and leave as bytes."""

    corks = Corks()

    async def session(_: object, context: Any) -> None:
        try:
            caller = state.callers.identify(context.invocation_metadata())
        except MegatokenError as error:
            await refuse(context, error)
            return
        await ClientSession(state, config, caller).serve(context)

    async def generate(raw: bytes, context: Any) -> None:
        await serve_generate(state, corks, raw, context)

    return grpc.method_handlers_generic_handler(
        "megatoken.v1.Tokens",
        {
            "Session": grpc.stream_stream_rpc_method_handler(session),
            "Generate": grpc.unary_stream_rpc_method_handler(generate),
        },
    )


class RouterService(router_pb2_grpc.RouterServicer):
    """Everything beside Tokens. `ask_key(metadata)` raises AuthError for a caller without a key where one is needed."""

    def __init__(self, state: RouterState, leases: IssuedLeases, ask_key: Callable[[CallMetadata], object]) -> None:
        self._state = state
        self._leases = leases
        self._ask_key = ask_key

    async def _identify(self, context: Any) -> None:
        try:
            self._ask_key(context.invocation_metadata())
        except MegatokenError as error:
            await refuse(context, error)

    async def Assign(self, request: router_pb2.AssignRequest, context: Any) -> router_pb2.AssignResponse:
        try:
            caller = self._state.callers.identify(context.invocation_metadata())
            return self._leases.assign(request, caller, time.monotonic())
        except MegatokenError as error:
            self._state.count_refusal(request.model, error)
            await refuse(context, error)
            raise

    async def Release(self, request: router_pb2.ReleaseRequest, context: Any) -> router_pb2.ReleaseResponse:
        await self._identify(context)
        self._leases.release(request.lease, request.failed, time.monotonic())
        return router_pb2.ReleaseResponse()

    async def Leases(self, requests: AsyncIterator[router_pb2.LeasesRequest], context: Any) -> None:
        try:
            caller = self._state.callers.identify(context.invocation_metadata())
        except MegatokenError as error:
            await refuse(context, error)
            return
        await serve_leases(self._state, self._leases, caller, requests, context)

    async def ListModels(self, request: router_pb2.ListModelsRequest, context: Any) -> router_pb2.ListModelsResponse:
        await self._identify(context)
        return models(self._state)

    async def GetRouterStatus(
        self, request: router_pb2.GetRouterStatusRequest, context: Any
    ) -> router_pb2.RouterStatus:
        await self._identify(context)
        return router_status(self._state)
