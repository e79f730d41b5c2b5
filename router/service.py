"""The gRPC services of a router, as raw-bytes handlers where tokens pass, and generated ones elsewhere."""

from __future__ import annotations

from typing import Any

import grpc

from megatoken.errors import MegatokenError
from megatoken.v1 import router_pb2, router_pb2_grpc
from router.client_session import ClientSession
from router.config import RouterConfig
from router.door import Door
from router.generate import refuse, serve_generate
from router.state import RouterState
from router.status import models, router_status


def tokens_handler(state: RouterState, config: RouterConfig, door: Door) -> Any:
    """megatoken.v1.Tokens without serializers: messages arrive and leave as bytes."""

    async def session(_: object, context: Any) -> None:
        try:
            caller = door.identify(context.invocation_metadata())
        except MegatokenError as error:
            await refuse(context, error)
            return
        await ClientSession(state, config, door, caller).serve(context)

    async def generate(raw: bytes, context: Any) -> None:
        await serve_generate(state, config, door, raw, context)

    return grpc.method_handlers_generic_handler(
        "megatoken.v1.Tokens",
        {
            "Session": grpc.stream_stream_rpc_method_handler(session),
            "Generate": grpc.unary_stream_rpc_method_handler(generate),
        },
    )


class RouterService(router_pb2_grpc.RouterServicer):
    """Everything beside Tokens."""

    def __init__(self, state: RouterState, config: RouterConfig, door: Door) -> None:
        self._state = state
        self._config = config
        self._door = door

    async def _identify(self, context: Any) -> None:
        try:
            self._door.identify(context.invocation_metadata())
        except MegatokenError as error:
            await refuse(context, error)

    async def ListModels(self, request: router_pb2.ListModelsRequest, context: Any) -> router_pb2.ListModelsResponse:
        await self._identify(context)
        return models(self._state)

    async def GetRouterStatus(
        self, request: router_pb2.GetRouterStatusRequest, context: Any
    ) -> router_pb2.RouterStatus:
        await self._identify(context)
        return router_status(self._state)
