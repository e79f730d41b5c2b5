"""The agent's two streams to the controller: attendance out, membership in. Reconnects for as long as the agent lives.

Both streams live and die together: a cut link may leave a stream open that carries nothing, and the missing answers to
attendance show it. While no controller answers, the agent keeps reducing in the epoch it has.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Any, Final

import grpc

from megatoken.log import log_event
from megatoken.v1 import membership_pb2, membership_pb2_grpc, throughput_pb2, throughput_pb2_grpc

ANSWER_TIMEOUT_S: Final = 3.0
RETRY_S: Final = (0.1, 0.2, 0.5, 1.0)
CHANNEL_OPTIONS: Final = (
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.max_receive_message_length", 64 << 20),  # snapshots are whole
    ("grpc.use_local_subchannel_pool", 1),
)
logger = logging.getLogger(__name__)


class ControllerLink:
    """Sends what `attendance()` returns every `attend_s` and after `hurry()`; gives each snapshot to `on_snapshot`."""

    def __init__(
        self,
        controllers: Sequence[str],
        watcher: str,
        attend_s: float,
        attendance: Callable[[], throughput_pb2.Attendance],
        on_snapshot: Callable[[membership_pb2.Snapshot], None],
        on_refused: Callable[[str], None],
    ) -> None:
        self._controllers, self._watcher, self._attend_s = tuple(controllers), watcher, attend_s
        self._attendance, self._on_snapshot, self._on_refused = attendance, on_snapshot, on_refused
        self._hurry = asyncio.Event()
        self._version = (0, 0)
        self.connected = False

    def hurry(self) -> None:
        """Attend now instead of at the next period: something changed."""
        self._hurry.set()

    async def run(self) -> None:
        """Until cancelled."""
        failures = 0
        for address in itertools.cycle(self._controllers):
            try:
                await self._session(address)
            except* (grpc.aio.AioRpcError, TimeoutError, OSError) as group:
                error = group.exceptions[0]
                detail = error.details() if isinstance(error, grpc.aio.AioRpcError) else str(error)
                if self.connected or failures == 0:
                    log_event(logger, "controller.lost", f"controller {address}: {detail}", level=logging.WARNING)
                failures = 0 if self.connected else failures + 1
            self.connected = False
            await asyncio.sleep(RETRY_S[min(failures, len(RETRY_S) - 1)])

    async def _session(self, address: str) -> None:
        channel: grpc.aio.Channel
        async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel, asyncio.TaskGroup() as tasks:
            tasks.create_task(self._attend(channel, address))
            tasks.create_task(self._watch(channel))

    async def _attend(self, channel: grpc.aio.Channel, address: str) -> None:
        call: Any = throughput_pb2_grpc.ThroughputAttendanceStub(channel).Attend()
        try:
            while True:
                self._hurry.clear()
                async with asyncio.timeout(ANSWER_TIMEOUT_S):
                    await call.write(self._attendance())
                    reply = await call.read()
                if not isinstance(reply, throughput_pb2.AttendanceReply):  # the end of the stream
                    raise ConnectionError(f"the controller ended the stream: {await call.details()}")
                if not self.connected:
                    self.connected = True
                    log_event(logger, "controller.connected", f"controller {address} answers", controller=address)
                self._on_refused(reply.refused)
                try:
                    async with asyncio.timeout(self._attend_s):
                        await self._hurry.wait()
                except TimeoutError:
                    pass
        finally:
            call.cancel()

    async def _watch(self, channel: grpc.aio.Channel) -> None:
        epoch, version = self._version
        request = membership_pb2.WatchRequest(watcher=self._watcher, epoch=epoch, version=version)
        async for snapshot in membership_pb2_grpc.MembershipStub(channel).Watch(request):
            self._version = (snapshot.epoch, snapshot.version)
            self._on_snapshot(snapshot)
        raise ConnectionError("the controller ended the membership stream")
