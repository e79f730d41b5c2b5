"""The ThroughputAttendance service: agents' streams in, groups out. Runs in the controller; decides nothing itself.

    attendance = AttendanceServicer(publish)      # publish(group: ThroughputGroup, why: str), on the event loop
    attendance.attach(server)                     # a grpc.aio server
    await attendance.start(); ...; await attendance.stop()

`publish` puts the group into the next membership snapshot. A controller that keeps state passes the last epoch it
published as `last_epoch`: numbers never come twice then, even when every agent is out of sight at its restart. See
`group` for the rules.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

import grpc

from megatoken.v1 import membership_pb2, throughput_pb2, throughput_pb2_grpc
from megatoken.worker.throughput.decide.group import (
    Attended,
    Attendee,
    Group,
    GroupPolicy,
    Groups,
    RefusalKind,
    Refused,
    Stance,
)

logger = logging.getLogger(__name__)

POLL_S: Final = 0.1
MAX_AGENTS: Final = 10_000
STANCES: Final = {
    throughput_pb2.ATTENDANCE_STATE_UNSPECIFIED: Stance.OUTSIDE,
    throughput_pb2.ATTENDANCE_STATE_OUTSIDE: Stance.OUTSIDE,
    throughput_pb2.ATTENDANCE_STATE_FORMING: Stance.FORMING,
    throughput_pb2.ATTENDANCE_STATE_TICKING: Stance.TICKING,
    throughput_pb2.ATTENDANCE_STATE_FAILED: Stance.FAILED,
}
REFUSALS: Final = {
    RefusalKind.WIRE_VERSION: throughput_pb2.ATTENDANCE_REFUSAL_WIRE_VERSION,
    RefusalKind.REPLACED: throughput_pb2.ATTENDANCE_REFUSAL_REPLACED,
    RefusalKind.BACKEND: throughput_pb2.ATTENDANCE_REFUSAL_BACKEND,
}
Publish = Callable[[membership_pb2.ThroughputGroup, str], None]  # the group, and why it was formed


class AttendanceServicer(throughput_pb2_grpc.ThroughputAttendanceServicer):
    """Holds the Groups of one controller."""

    def __init__(
        self,
        publish: Publish,
        policy: GroupPolicy | None = None,
        clock: Callable[[], float] = time.monotonic,
        last_epoch: int = 0,
        on_fault: Callable[[], None] = lambda: None,
    ) -> None:
        self.groups = Groups(policy or GroupPolicy(), last_epoch=last_epoch)
        self._on_fault, self._published = on_fault, self.groups.group.epoch
        self._publish, self._clock = publish, clock
        self._streams: dict[str, set[object]] = {}  # an agent may open a new one before its last ends
        self._poller: asyncio.Task[None] | None = None

    def attach(self, server: grpc.aio.Server) -> None:
        """Adds the service to a server that has not started."""
        throughput_pb2_grpc.add_ThroughputAttendanceServicer_to_server(self, server)

    async def start(self) -> None:
        """Begins to decide."""
        self._poller = asyncio.create_task(self._poll_forever())

    async def stop(self) -> None:
        """Ends deciding; streams end with the server."""
        if self._poller is not None:
            self._poller.cancel()
            await asyncio.gather(self._poller, return_exceptions=True)

    async def Attend(
        self, messages: AsyncIterator[throughput_pb2.Attendance], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[throughput_pb2.AttendanceReply]:
        """One agent's life."""
        mine = object()
        agent = ""
        stance: tuple[int, Stance] | None = None
        try:
            async for message in messages:
                said = attended_of(message)
                if agent not in ("", said.attendee.agent):
                    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "member.agent changed within one stream")
                if not agent and len(self._streams) >= MAX_AGENTS:
                    await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{MAX_AGENTS} agents attend already")
                agent = said.attendee.agent
                self._streams.setdefault(agent, set()).add(mine)
                refused = self.groups.attended(said, self._clock())
                if (said.epoch, said.state) != stance:
                    stance = (said.epoch, said.state)
                    self._poll()
                yield reply_of(self.groups.group.epoch, refused)
        finally:
            if agent:
                self._streams[agent].discard(mine)
                if not self._streams[agent]:
                    del self._streams[agent]
                    self.groups.left(agent, self._clock())
                    self._poll()

    def _poll(self) -> None:
        """Publishes the group if it is another than was last published. Never raises: the next poll tries again."""
        try:
            self.groups.poll(self._clock())
            group = self.groups.group  # new, or adopted
            if group.epoch != self._published:
                self._publish(to_message(group), group.why)
                self._published = group.epoch
        except Exception:
            logger.exception("a throughput group could not be published")
            self._on_fault()

    async def _poll_forever(self) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            self._poll()


def reply_of(epoch: int, refused: Refused | None) -> throughput_pb2.AttendanceReply:
    """The answer to an agent: the present group, and whether it is kept out of every one."""
    if refused is None:
        return throughput_pb2.AttendanceReply(epoch=epoch)
    return throughput_pb2.AttendanceReply(epoch=epoch, refused=refused.text, refusal=REFUSALS[refused.kind])


def attended_of(message: throughput_pb2.Attendance) -> Attended:
    """The values of a message."""
    member = message.member
    attendee = Attendee(
        member.agent,
        member.node,
        member.site,
        member.address,
        member.store_address,
        tuple(message.backends),
        message.wire_version,
    )
    return Attended(
        attendee,
        message.epoch,
        STANCES.get(message.state, Stance.OUTSIDE),
        message.problem,
        tuple(message.suspects),
        tuple(message.members),
    )


def to_message(group: Group) -> membership_pb2.ThroughputGroup:
    """The group for a membership snapshot, stamped with the wall clock."""
    members = [
        membership_pb2.ThroughputMember(
            agent=member.agent,
            node=member.node,
            site=member.site,
            address=member.address,
            store_address=member.store_address,
        )
        for member in group.members
    ]
    return membership_pb2.ThroughputGroup(
        epoch=group.epoch,
        members=members,
        published_unix_s=time.time(),
        backend=group.backend,
        hierarchical=group.hierarchical,
        why=group.why,
    )
