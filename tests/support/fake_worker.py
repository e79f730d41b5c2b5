"""A stand-in for a worker on a free loopback port: it describes itself, answers probes, and keeps sessions open.

async with FakeWorker("m-0", 1) as worker:
    ... worker.address ..., worker.probes, worker.sessions
"""

from __future__ import annotations

import asyncio
from typing import Any, Self

import grpc
import grpc.aio

from megatoken.v1 import tokens_pb2, worker_pb2, worker_pb2_grpc


class FakeWorker(worker_pb2_grpc.WorkerServicer):
    """`well` is whether a probe makes its token; who it says it is may change."""

    def __init__(self, replica: str, incarnation: int) -> None:
        self.replica, self.incarnation = replica, incarnation
        self.well = True
        self.probes = 0
        self.described = 0
        self.sessions = 0
        self.address = ""

    async def Describe(self, request: worker_pb2.DescribeRequest, context: Any) -> worker_pb2.DescribeResponse:
        self.described += 1
        return worker_pb2.DescribeResponse(replica=self.replica, incarnation=self.incarnation)

    async def GetLoad(self, request: worker_pb2.GetLoadRequest, context: Any) -> tokens_pb2.Load:
        return tokens_pb2.Load()

    async def Probe(self, request: worker_pb2.ProbeRequest, context: Any) -> worker_pb2.ProbeResponse:
        self.probes += 1
        if not self.well:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the engine is not well")
        return worker_pb2.ProbeResponse()

    async def _session(self, _requests: Any, context: Any) -> None:
        self.sessions += 1
        await asyncio.Event().wait()

    async def __aenter__(self) -> Self:
        self._server = grpc.aio.server()
        worker_pb2_grpc.add_WorkerServicer_to_server(self, self._server)
        handler = grpc.stream_stream_rpc_method_handler(self._session)
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("megatoken.v1.Tokens", {"Session": handler}),)
        )
        port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        self.address = f"127.0.0.1:{port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._server.stop(0)
