"""The attendance service around the rules: what it publishes, and that a failure to publish ends nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from megatoken.v1 import membership_pb2, throughput_pb2
from megatoken.worker.throughput.attendance import REFUSALS, AttendanceServicer, reply_of
from megatoken.worker.throughput.decide.group import Attended, Attendee, GroupPolicy, RefusalKind, Refused

AT_ONCE = GroupPolicy(gather_s=0.0, gather_max_s=0.0)


def said(name: str) -> Attended:
    return Attended(Attendee(name, f"node-{name}", "", f"{name}:1", f"{name}:2"))


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise TimeoutError("it did not come about in 5 s")


async def test_a_publish_that_fails_is_counted_and_tried_again() -> None:
    published: list[int] = []
    faults: list[str] = []

    def publish(group: membership_pb2.ThroughputGroup, _why: str) -> None:
        if len(faults) < 2:
            raise OSError("disk full")
        published.append(group.epoch)

    attendance = AttendanceServicer(publish, AT_ONCE, on_fault=lambda: faults.append("attendance"))
    await attendance.start()
    try:
        attendance.groups.attended(said("a"), asyncio.get_running_loop().time())
        await until(lambda: bool(published))
        assert (published, len(faults)) == ([1], 2)
        attendance.groups.attended(said("b"), asyncio.get_running_loop().time())
        await until(lambda: len(published) == 2)
        assert published == [1, 2]
    finally:
        await attendance.stop()


async def test_numbers_go_on_after_those_of_an_earlier_controller() -> None:
    published: list[int] = []
    attendance = AttendanceServicer(lambda group, _why: published.append(group.epoch), AT_ONCE, last_epoch=41)
    await attendance.start()
    try:
        attendance.groups.attended(said("a"), asyncio.get_running_loop().time())
        await until(lambda: bool(published))
        assert published == [42]
    finally:
        await attendance.stop()


def test_an_agent_that_is_kept_out_is_told_why_as_a_value() -> None:
    reply = reply_of(3, Refused(RefusalKind.BACKEND, "set its backend to auto"))
    assert (reply.epoch, reply.refused) == (3, "set its backend to auto")
    assert reply.refusal == throughput_pb2.ATTENDANCE_REFUSAL_BACKEND
    assert reply_of(3, None) == throughput_pb2.AttendanceReply(epoch=3)
    assert set(REFUSALS) == set(RefusalKind)
