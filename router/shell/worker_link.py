"""WorkerLink: the router's one session to one replica's worker, reopened with backoff while the replica is a member.

A shell: reads frames and hands them to the core, writes what the core wants to start and cancel. Starts and cancels
that come while a write is under way go out together in the next message. Before a session begins, the worker says who
it is: an address may have been taken over by another replica, or by a new life of this one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any, cast

import grpc
from grpc import aio

from megatoken.router import wire
from megatoken.router.core import recovery
from megatoken.router.core.state import RouterState
from megatoken.router.fleet.fleet import Endpoint
from megatoken.router.intake.load import take_load
from megatoken.router.secure import EOF
from megatoken.router.shell.inbox import Inbox
from megatoken.v1 import tokens_pb2, worker_pb2

log = logging.getLogger(__name__)

MAX_BATCH_BYTES = 2 << 20  # of starts in one ClientFrame; a single larger one goes alone
CONNECT_S = 10.0
PING_EVERY_S = 5.0
PING_TIMEOUT_S = 5.0
DESCRIBE_S = 5.0
_BACKOFF_S = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)


class WorkerLink:
    """`run` until `close`. The core sees it through fleet.Link."""

    def __init__(
        self, state: RouterState, inbox: Inbox, replica: Endpoint, open_channel: Callable[[str], aio.Channel]
    ) -> None:
        self._inbox = inbox
        self._state = state
        self._replica = replica
        self._open_channel = open_channel
        self._starts: list[bytes] = []
        self._cancels: list[int] = []
        self._something = asyncio.Event()
        self._probe_due = asyncio.Event()
        self._call: Any = None
        self._why = ""
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name=f"link {self._replica.name}")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def send_start(self, slot: int, request: bytes) -> None:
        self._starts.append(wire.start(slot, request))
        self._something.set()

    def send_cancel(self, slot: int) -> None:
        self._cancels.append(slot)
        self._something.set()

    def probe(self) -> None:
        self._probe_due.set()

    def cut(self, reason: str) -> None:
        self._why = reason
        if self._call is not None:
            self._call.cancel()

    async def _run(self) -> None:
        failures = 0
        while True:
            began = time.monotonic()
            try:
                try:
                    await self._connect_and_serve()
                finally:
                    self._let_go()
            except Exception:  # a certificate that cannot be read just now, say: the next attempt may find it mended
                self._state.ledger.connection_faults += 1
                log.exception("the link to replica %s failed, and goes on", self._replica.name)
            failures = 0 if time.monotonic() - began > 5 else failures + 1
            await asyncio.sleep(_BACKOFF_S[min(failures, len(_BACKOFF_S)) - 1] if failures else _BACKOFF_S[0])

    def _let_go(self) -> None:
        """The session is over, however it came to that."""
        why, self._why, self._call = self._why, "", None
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
            call = cast(Any, channel).stream_stream("/megatoken.v1.Tokens/Session")()
            self._call = call
            self._starts.clear()
            self._cancels.clear()
            self._probe_due.clear()
            self._replica.link = self
            recovery.connect(self._state, self._replica, time.monotonic())
            helpers.append(asyncio.create_task(self._write(call)))
            helpers.append(asyncio.create_task(self._ping(channel)))
            helpers.append(asyncio.create_task(self._probe(channel)))
            await self._read(call)
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
            await channel.close(None)

    async def _is_it(self, channel: aio.Channel) -> bool:
        """Whether the replica's own worker answers at its address. Raises AioRpcError when none does."""
        describe = channel.unary_unary(
            "/megatoken.v1.Worker/Describe",
            request_serializer=worker_pb2.DescribeRequest.SerializeToString,
            response_deserializer=worker_pb2.DescribeResponse.FromString,
        )
        found = await describe(worker_pb2.DescribeRequest(), timeout=DESCRIBE_S)
        member = self._replica.member
        if (found.replica, found.incarnation) == (member.replica, member.incarnation):
            return True
        log.warning(
            "%s (%d) answers at %s, and not replica %s (%d): it gets no request",
            found.replica, found.incarnation, member.address, member.replica, member.incarnation,
        )  # fmt: skip
        return False

    async def _read(self, call: Any) -> None:
        replica, inbox = self._replica, self._inbox
        while True:
            raw = await call.read()
            if raw is EOF:
                inbox.drain()  # what came is taken in before the session counts as lost
                return
            inbox.put(replica, raw)

    async def _write(self, call: Any) -> None:
        try:
            while True:
                await self._something.wait()
                self._something.clear()
                while self._starts or self._cancels:
                    await call.write(self._take())
        except (aio.AioRpcError, asyncio.InvalidStateError):
            call.cancel()

    def _take(self) -> bytes:
        """One ClientFrame. Cancels go after all starts, in the last message."""
        size, taken = 0, 0
        for start in self._starts:
            if taken and size + len(start) > MAX_BATCH_BYTES:
                break
            size += len(start)
            taken += 1
        batch, self._starts = self._starts[:taken], self._starts[taken:]
        if not self._starts and self._cancels:
            batch.append(wire.cancel(self._cancels))
            self._cancels = []
        return b"".join(batch)

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
