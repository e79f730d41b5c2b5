"""Look-aside for a client with many requests: leases of replicas, many of them over one call.

async with LeaseClient("127.0.0.1:7000") as leases:
    lease = await leases.assign(router_pb2.AssignRequest(model="m", prompt_tokens=3, max_tokens=64))
    async with TokenClient([lease.address]) as worker:
        await worker.generate("m", [1, 2, 3], max_tokens=64, lease=lease).tokens()
    leases.release(lease)
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any, Final, Self

from grpc import aio

from megatoken.errors import MegatokenError, UnavailableError
from megatoken.router.client.columns import error_of
from megatoken.router.secure import EOF, channel_to
from megatoken.tls import ClientTls
from megatoken.v1 import router_pb2, router_pb2_grpc

MAX_A_MESSAGE: Final = 256  # small enough that nobody waits long for the others of its message

CLOSE_S: Final = 5.0

Waiting = list["asyncio.Future[router_pb2.AssignResponse]"]


class LeaseClient:
    """Leases from one router. What is asked in one turn of the loop travels in one message."""

    def __init__(self, router: str, *, api_key: str | None = None, tls: ClientTls | None = None) -> None:
        self._channel = channel_to(router, tls)
        self._metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()
        self._asked: deque[tuple[router_pb2.AssignRequest, asyncio.Future[router_pb2.AssignResponse]]] = deque()
        self._released: deque[router_pb2.ReleaseRequest] = deque()
        self._unanswered: deque[Waiting] = deque()  # by message
        self._something = asyncio.Event()
        self._closing = False
        self._lost: MegatokenError | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        call = router_pb2_grpc.RouterStub(self._channel).Leases(metadata=self._metadata)
        self._tasks = [asyncio.create_task(self._run(half(call))) for half in (self._write, self._read)]
        return self

    async def __aexit__(self, *_: object) -> None:
        """Sends what was released; leases that nobody released end by themselves."""
        self._closing = True
        self._something.set()
        await asyncio.wait(self._tasks, timeout=CLOSE_S)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._fail(UnavailableError("the client was closed"))
        await self._channel.close(None)

    async def assign(self, request: router_pb2.AssignRequest) -> router_pb2.AssignResponse:
        """Raises the router's refusal, and UnavailableError once the call is lost."""
        if self._lost is not None:
            raise self._lost
        answer: asyncio.Future[router_pb2.AssignResponse] = asyncio.get_running_loop().create_future()
        self._asked.append((request, answer))
        self._something.set()
        return await answer

    def release(self, lease: router_pb2.AssignResponse, *, failed: bool = False) -> None:
        """Its place is free again. A lease of a lost call ends by itself."""
        self._released.append(router_pb2.ReleaseRequest(lease=lease.lease, failed=failed))
        self._something.set()

    async def _write(self, call: Any) -> None:
        while not self._closing:
            await self._something.wait()
            await asyncio.sleep(0)  # whoever else is ready in this turn
            self._something.clear()
            while self._asked or self._released:
                asked = [self._asked.popleft() for _ in range(min(len(self._asked), MAX_A_MESSAGE))]
                released = [self._released.popleft() for _ in range(min(len(self._released), MAX_A_MESSAGE))]
                if asked:
                    self._unanswered.append([answer for _, answer in asked])
                await call.write(router_pb2.LeasesRequest(release=released, assign=[request for request, _ in asked]))
        await call.done_writing()

    async def _read(self, call: Any) -> None:
        while (response := await call.read()) is not EOF:  # after the last answer, or when the call is lost
            for answer, outcome in zip(self._unanswered.popleft(), response.outcomes, strict=True):
                if answer.done():  # nobody waits any more
                    if outcome.HasField("lease"):
                        self.release(outcome.lease)
                elif outcome.HasField("lease"):
                    answer.set_result(outcome.lease)
                else:
                    answer.set_exception(error_of(outcome.code, outcome.message, outcome.retry_after_ms))
        if not self._closing:
            raise UnavailableError("the router ended the call")

    async def _run(self, half: Any) -> None:
        try:
            await half
        except MegatokenError as error:
            self._fail(error)
        except aio.AioRpcError as error:
            self._fail(error_of(error.code().value[0], error.details() or "the call is lost"))
        except asyncio.InvalidStateError:  # a write to a call that is over: the reader says why
            return

    def _fail(self, error: MegatokenError) -> None:
        self._lost = self._lost or error
        waiting = [answer for answers in self._unanswered for answer in answers]
        for answer in [*waiting, *(answer for _, answer in self._asked)]:
            if not answer.done():
                answer.set_exception(self._lost)
        self._unanswered.clear()
        self._asked.clear()
