"""An agent's streams to the controller: TLS, a controller that stands still, and one that goes away. No torch here."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from megatoken.tls import ClientTls, ServerTls
from megatoken.v1 import membership_pb2, membership_pb2_grpc, throughput_pb2
from megatoken.worker.throughput.attendance import AttendanceServicer
from megatoken.worker.throughput.controller_link import ControllerLink
from megatoken.worker.throughput.decide.layout import WIRE_VERSION
from tests.support.certificates import Authority
from tests.support.throughput_cluster import FakeController


class Attending:
    """A link that attends as one agent, and what it was told."""

    def __init__(self, controllers: list[str], tls: ClientTls | None = None) -> None:
        self.snapshots: list[membership_pb2.Snapshot] = []
        member = membership_pb2.ThroughputMember(agent="a", node="n", address="x:1", store_address="x:2")
        message = throughput_pb2.Attendance(member=member, backends=["gloo"], wire_version=WIRE_VERSION)
        self.link = ControllerLink(
            controllers, "a", 0.1, lambda: message, self.snapshots.append, lambda reason: None, tls
        )

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Attending]:
        task = asyncio.create_task(self.link.run())
        try:
            yield self
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def until_grouped(self, timeout_s: float = 20.0) -> membership_pb2.ThroughputGroup:
        async with asyncio.timeout(timeout_s):
            while not self.snapshots or not self.snapshots[-1].throughput.members:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        return self.snapshots[-1].throughput


@contextlib.asynccontextmanager
async def controller(tls: ServerTls | None = None) -> AsyncIterator[FakeController]:
    made = FakeController()
    made.tls = tls
    await made.start()
    try:
        yield made
    finally:
        await made.stop()


async def test_attendance_and_membership_go_over_mutual_tls(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    shown, key = authority.issue("controller")
    own, own_key = authority.issue("agent")
    server = ServerTls(cert_file=shown, key_file=key, client_ca_file=authority.ca_file)
    client = ClientTls(ca_file=authority.ca_file, cert_file=own, key_file=own_key)
    async with controller(server) as made:
        async with Attending([made.address], client).running() as agent:
            assert [member.agent for member in (await agent.until_grouped()).members] == ["a"]
        async with Attending([made.address]).running() as agent:
            with pytest.raises(TimeoutError):
                await agent.until_grouped(1.5)
            assert not agent.link.connected


async def test_the_next_controller_is_tried_when_one_does_not_answer() -> None:
    async with controller() as made, Attending(["127.0.0.1:1", made.address]).running() as agent:
        assert await agent.until_grouped()


class StandingAttendance(AttendanceServicer):
    """Takes no message while `going` is clear, as a controller does that stands still."""

    def __init__(self, publish: Any) -> None:
        super().__init__(publish)
        self.going = asyncio.Event()
        self.going.set()

    async def Attend(self, messages: Any, context: Any) -> AsyncIterator[Any]:
        async def gated() -> AsyncIterator[Any]:
            async for message in messages:
                await self.going.wait()
                yield message

        async for reply in super().Attend(gated(), context):
            yield reply


async def test_a_controller_that_stood_still_does_not_lose_its_agents() -> None:
    made = FakeController()
    attendance = StandingAttendance(made.publish)
    server = grpc.aio.server()
    attendance.attach(server)
    membership_pb2_grpc.add_MembershipServicer_to_server(made, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    await attendance.start()
    try:
        async with Attending([f"127.0.0.1:{port}"]).running() as agent:
            await agent.until_grouped()
            attendance.going.clear()
            async with asyncio.timeout(20):
                while agent.link.connected:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
                while len(agent.link._sessions) < 2:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
                attendance.going.set()
                while len(agent.link._sessions) != 1 or not agent.link.connected:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
            assert not attendance.groups._agents["a"].gone
            assert "a" in attendance.groups.group.agents
    finally:
        await attendance.stop()
        await server.stop(0)
