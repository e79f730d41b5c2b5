"""The agent's two streams to the controller: attendance out, membership in. Reconnects for as long as the agent lives.

Both streams live and die together: a cut link may leave a stream open that carries nothing, and the missing answers to
attendance show it. While no controller answers, the agent keeps reducing in the epoch it has.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import grpc

from megatoken.access.channel import Present, presenting
from megatoken.log import log_event
from megatoken.reconnect import Pauses
from megatoken.tls import ClientTls, Options, open_channel
from megatoken.v1 import membership_pb2, membership_pb2_grpc, throughput_pb2, throughput_pb2_grpc

ANSWER_TIMEOUT_S: Final = 2.0
CHECK_S: Final = 0.1
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 1.0
CHANNEL_OPTIONS: Final[Options] = [
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.max_receive_message_length", 64 << 20),  # snapshots are whole
    ("grpc.use_local_subchannel_pool", 1),
]
logger = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class _Session:
    """One try at one controller."""

    address: str
    opened_s: float
    answered_s: float | None = None  # when it last answered
    task: asyncio.Task[None] | None = None

    def silent_s(self, now: float) -> float:
        """Seconds since it answered, or since it was opened."""
        return now - (self.opened_s if self.answered_s is None else self.answered_s)


class ControllerLink:
    """Sends what `attendance()` returns every `attend_s` and after `hurry()`; gives each snapshot to `on_snapshot`.

    A session that is not answered is kept beside its successor until that one is: to the controller, the end of an
    agent's last stream is the end of the agent, and a controller that stood still for a while must not believe that.
    """

    def __init__(
        self,
        controllers: Sequence[str],
        watcher: str,
        attend_s: float,
        attendance: Callable[[], throughput_pb2.Attendance],
        on_snapshot: Callable[[membership_pb2.Snapshot], None],
        on_reply: Callable[[throughput_pb2.AttendanceReply], None],
        tls: ClientTls | None = None,
        present: Present | None = None,
    ) -> None:
        self._addresses, self._watcher, self._attend_s = itertools.cycle(controllers), watcher, attend_s
        self._attendance, self._on_snapshot, self._on_reply = attendance, on_snapshot, on_reply
        self._tls, self._present = tls, present
        self._patience_s = attend_s + ANSWER_TIMEOUT_S
        self._hurry = asyncio.Event()
        self._version = (0, 0)
        self._sessions: list[_Session] = []
        self._pauses = Pauses(FIRST_PAUSE_S, LONGEST_PAUSE_S)
        self._retry_s = 0.0  # not before, loop time
        self.connected = False

    def hurry(self) -> None:
        """Attend now instead of at the next period: something changed."""
        self._hurry.set()

    async def run(self) -> None:
        """Until cancelled."""
        try:
            while True:
                self._tend(asyncio.get_running_loop().time())
                await asyncio.sleep(CHECK_S)
        finally:
            for session in self._sessions:
                self._end(session)

    def _tend(self, now: float) -> None:
        """Keeps the session that answers, and beside a silent one a younger one that tries."""
        for session in [one for one in self._sessions if one.task is not None and one.task.done()]:
            self._sessions.remove(session)
            self._note_end(session, now)
        answering = [
            one for one in self._sessions if one.answered_s is not None and one.silent_s(now) < self._patience_s
        ]
        self.connected = bool(answering)
        if answering:
            best = max(answering, key=lambda one: one.answered_s or 0.0)
            for session in [one for one in self._sessions if one is not best]:
                self._sessions.remove(session)
                self._end(session)
            return
        if now >= self._retry_s and all(one.silent_s(now) >= self._patience_s for one in self._sessions):
            while len(self._sessions) > 1:  # the oldest stays: the controller may still believe in it
                self._end(self._sessions.pop())
            session = _Session(next(self._addresses), now)
            session.task = asyncio.create_task(self._run_session(session))
            self._sessions.append(session)

    def _end(self, session: _Session) -> None:
        if session.task is not None:
            session.task.cancel()

    def _note_end(self, session: _Session, now: float) -> None:
        """Logs the end of a session once, and says when to try again."""
        error = session.task.exception() if session.task is not None and not session.task.cancelled() else None
        if session.answered_s is not None or self._pauses.failures == 0:
            detail = error.details() if isinstance(error, grpc.aio.AioRpcError) else str(error)
            log_event(logger, "controller.lost", f"controller {session.address}: {detail}", level=logging.WARNING)
        self._retry_s = now + self._pauses.after(math.inf if session.answered_s is not None else 0.0)

    async def _run_session(self, session: _Session) -> None:
        """Both streams, until one ends. Raises what ended it."""
        opened = open_channel(session.address, self._tls, list(CHANNEL_OPTIONS))
        async with presenting(opened, self._present) as channel:
            streams = [asyncio.create_task(work) for work in (self._attend(channel, session), self._watch(channel))]
            try:
                await asyncio.wait(streams, return_when=asyncio.FIRST_COMPLETED)
                for stream in streams:
                    if stream.done():
                        stream.result()
            finally:
                for stream in streams:
                    stream.cancel()
                await asyncio.gather(*streams, return_exceptions=True)

    async def _attend(self, channel: grpc.aio.Channel, session: _Session) -> None:
        loop = asyncio.get_running_loop()
        call: Any = throughput_pb2_grpc.ThroughputAttendanceStub(channel).Attend()
        try:
            while True:
                self._hurry.clear()
                await call.write(self._attendance())
                reply = await call.read()
                if not isinstance(reply, throughput_pb2.AttendanceReply):  # the end of the stream
                    raise ConnectionError(f"the controller ended the stream: {await call.details()}")
                if session.answered_s is None:
                    log_event(logger, "controller.connected", controller=session.address)
                session.answered_s = loop.time()
                self.connected = True
                self._on_reply(reply)
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
