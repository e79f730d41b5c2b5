"""WorkerLink: the router's one session to one replica's worker, reopened with backoff while the replica is a member.

A shell: reads frames and hands them to the core, writes what the core wants to start and cancel. Before a session
begins, the worker says who it is: an address may have been taken over by another replica, or by a new life of this one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

import grpc
from grpc import aio

from megatoken.reconnect import Pauses, keep_connected
from megatoken.router.client.session import SessionClient
from megatoken.router.core import recovery
from megatoken.router.core.state import RouterState
from megatoken.router.fleet.fleet import Endpoint
from megatoken.router.intake.load import take_load
from megatoken.router.shell.inbox import Inbox
from megatoken.v1 import tokens_pb2, worker_pb2

log = logging.getLogger(__name__)

CONNECT_S = 10.0
PING_EVERY_S = 5.0
PING_TIMEOUT_S = 5.0
DESCRIBE_S = 5.0


class WorkerLink:
    """`run` until `close`. The core sees it through fleet.EndpointLink."""

    def __init__(
        self, state: RouterState, inbox: Inbox, replica: Endpoint, open_channel: Callable[[str], aio.Channel]
    ) -> None:
        self._inbox = inbox
        self._state = state
        self._replica = replica
        self._open_channel = open_channel
        self._probe_due = asyncio.Event()
        self._session: SessionClient | None = None
        self._why = ""
        self._stranger: tuple[str, int] | None = None  # who else answered at the address, last time
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(
            keep_connected(self._connect, Pauses(), self._failed), name=f"link {self._replica.name}"
        )

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def send_start(self, slot: int, request: bytes) -> None:
        if self._session is not None:
            self._session.start(slot, request)

    def send_cancel(self, slot: int) -> None:
        if self._session is not None:
            self._session.cancel((slot,))

    def probe(self) -> None:
        self._probe_due.set()

    def cut(self, reason: str) -> None:
        self._why = reason
        if self._session is not None:
            self._session.cut()

    def _failed(self, error: Exception) -> None:
        self._state.ledger.connection_faults += 1
        log.error("the link to replica %s failed, and goes on", self._replica.name, exc_info=error)

    async def _connect(self) -> None:
        try:
            await self._connect_and_serve()
        finally:
            self._note_end()

    def _note_end(self) -> None:
        """The session is over, however it came to that."""
        why, self._why, self._session = self._why, "", None
        if self._replica.connected:
            try:
                self._inbox.drain()
            finally:  # what is wrong with a frame must not keep requests on a replica that is gone
                why = why or f"lost the session to replica {self._replica.name}"
                recovery.lose_replica(self._state, self._replica, why, time.monotonic())

    async def _connect_and_serve(self) -> None:
        """One session, from connecting to its end. Errors of the connection end it quietly: the caller reopens."""
        channel = self._open_channel(self._replica.member.address)
        helpers: list[asyncio.Task[None]] = []
        try:
            async with asyncio.timeout(CONNECT_S):  # wait_for may lose a cancel, and the link would outlive its replica
                await channel.channel_ready()
            if not await self._is_it(channel):
                return
            session = self._session = SessionClient(channel)
            session.begin()
            self._probe_due.clear()
            self._replica.link = self
            recovery.connect(self._state, self._replica, time.monotonic())
            helpers.append(asyncio.create_task(self._ping(channel)))
            helpers.append(asyncio.create_task(self._probe(channel)))
            await self._read(session)
        except (aio.AioRpcError, TimeoutError, asyncio.InvalidStateError) as error:
            if self._replica.connected:
                log.warning("session to replica %s ended: %s", self._replica.name, _short(error))
            else:
                log.info("replica %s does not answer yet: %s", self._replica.name, _short(error))
        except asyncio.CancelledError:
            if asyncio.current_task() is self._task and self._task is not None and self._task.cancelling():
                raise
            log.warning("session to replica %s cut: %s", self._replica.name, self._why)
        finally:
            for helper in helpers:
                helper.cancel()
            if self._session is not None:
                await self._session.end()
            await channel.close(None)

    async def _is_it(self, channel: aio.Channel) -> bool:
        """Whether the replica's own worker answers at its address. Raises AioRpcError when none does."""
        describe = channel.unary_unary(
            "/megatoken.v1.Worker/Describe",
            request_serializer=worker_pb2.DescribeRequest.SerializeToString,
            response_deserializer=worker_pb2.DescribeResponse.FromString,
        )
        answer = await describe(worker_pb2.DescribeRequest(), timeout=DESCRIBE_S)
        found, member = (answer.replica, answer.incarnation), self._replica.member
        if found == (member.replica, member.incarnation):
            self._stranger = None
            return True
        if found != self._stranger:  # once, and not at every attempt
            log.warning(
                "%s (%d) answers at %s, and not replica %s (%d): it gets no request",
                *found, member.address, member.replica, member.incarnation,
            )  # fmt: skip
        self._stranger = found
        return False

    async def _read(self, session: SessionClient) -> None:
        replica, inbox = self._replica, self._inbox
        while (raw := await session.read()) is not None:
            inbox.put(replica, raw)
        inbox.drain()  # what came is taken in before the session counts as lost

    async def _ping(self, channel: aio.Channel) -> None:
        """Measures the round trip and reads the load of an idle worker. Never counts for or against the replica."""
        get_load = channel.unary_unary(
            "/megatoken.v1.Worker/GetLoad",
            request_serializer=worker_pb2.GetLoadRequest.SerializeToString,
            response_deserializer=tokens_pb2.Load.FromString,
        )
        while True:
            began = time.monotonic()
            try:
                load = await get_load(worker_pb2.GetLoadRequest(), timeout=PING_TIMEOUT_S)
            except aio.AioRpcError:
                load = None
            now = time.monotonic()
            if load is not None and self._replica.connected:
                took = now - began
                rtt = self._replica.rtt_s
                self._replica.rtt_s = took if rtt == 0 else min(took, rtt + 0.1 * (took - rtt))
                take_load(self._state, self._replica, load, now)
            await asyncio.sleep(PING_EVERY_S)

    async def _probe(self, channel: aio.Channel) -> None:
        """Probes whenever the core asks for it. No request, and the worker counts it in no total."""
        probe = channel.unary_unary(
            "/megatoken.v1.Worker/Probe",
            request_serializer=worker_pb2.ProbeRequest.SerializeToString,
            response_deserializer=worker_pb2.ProbeResponse.FromString,
        )
        while True:
            await self._probe_due.wait()
            self._probe_due.clear()
            well = False
            try:
                await probe(worker_pb2.ProbeRequest(), timeout=self._state.config.breaker.probe_timeout_s)
                well = True
            except aio.AioRpcError as error:
                log.warning("replica %s is not well yet: %s", self._replica.name, _short(error))
            finally:  # a circuit must not stay half-open
                recovery.probed(self._state, self._replica, time.monotonic(), well=well)


def _short(error: BaseException) -> str:
    if isinstance(error, aio.AioRpcError):
        code: grpc.StatusCode = error.code()
        return f"{code.name}: {(error.details() or '')[:200]}"
    return type(error).__name__
