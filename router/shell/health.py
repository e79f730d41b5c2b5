"""Standard gRPC health, with three questions by service name.

    live    this process answers
    ready   (also "", and each service) it takes new requests: not draining, and knows its fleet
    deep    every model that should be served generated one token just now, at a worker (Worker.Probe)

The deep check goes past the router's own account: it is no request, and moves no count of any replica.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Final, cast

from grpc import aio
from grpc_health.v1 import health, health_pb2

from megatoken.router.core.state import RouterState
from megatoken.router.fleet.fleet import Pool
from megatoken.v1 import worker_pb2

SERVING: Final = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING: Final = health_pb2.HealthCheckResponse.NOT_SERVING
PROBE_TIMEOUT_S: Final = 10.0
DEEP_FOR_S: Final = 2.0  # a deep answer is good for this long: checks cannot load the fleet
_REPLICAS_TRIED: Final = 2


class RouterHealth(cast(Any, health).aio.HealthServicer):  # type: ignore[misc]
    """`Check` answers "deep" by probing; everything else from what was `set`."""

    def __init__(self, state: RouterState, open_channel: Callable[[str], aio.Channel]) -> None:
        super().__init__()
        self._state = state
        self._open_channel = open_channel
        self._deep = asyncio.Lock()
        self._deep_until_s = 0.0
        self._deep_status = NOT_SERVING

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Any) -> health_pb2.HealthCheckResponse:
        if request.service != "deep":
            return await super().Check(request, context)
        async with self._deep:  # one at a time; those that waited take the answer that came
            if time.monotonic() >= self._deep_until_s:
                self._deep_status = await self._probe_all()
                self._deep_until_s = time.monotonic() + DEEP_FOR_S
        return health_pb2.HealthCheckResponse(status=self._deep_status)

    async def _probe_all(self) -> Any:
        pools = [pool for pool in self._state.fleet.pools.values() if pool.wanted or pool.replicas]
        answers = await asyncio.gather(*(self._probe(pool) for pool in pools))
        return SERVING if answers and all(answers) and not self._state.draining else NOT_SERVING

    async def _probe(self, pool: Pool) -> bool:
        """Whether one of the model's replicas makes a token."""
        for replica in [r for r in pool.replicas if r.connected and not r.draining][:_REPLICAS_TRIED]:
            channel = self._open_channel(replica.member.address)
            try:
                probe = channel.unary_unary(
                    "/megatoken.v1.Worker/Probe",
                    request_serializer=worker_pb2.ProbeRequest.SerializeToString,
                    response_deserializer=worker_pb2.ProbeResponse.FromString,
                )
                await probe(worker_pb2.ProbeRequest(), timeout=PROBE_TIMEOUT_S)
                return True
            except aio.AioRpcError:
                continue
            finally:
                await channel.close(None)
        return False
