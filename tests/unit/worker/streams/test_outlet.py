"""What waits for a slow caller is merged in order, and nothing of it is lost or told twice."""

from __future__ import annotations

from megatoken.tokens.frames import token_columns
from megatoken.tokens.outbox import MAX_FRAME_BYTES
from megatoken.v1 import tokens_pb2 as pb
from megatoken.v1.frame_columns_pb2 import Frame
from megatoken.worker.streams.outlet import FRAME_USAGE, LOOSE_FINISHES, WAITING_USAGE, Outlet
from tests.support.parts import frame_part

HALF = 100_000  # tokens; two of them in a part, and a frame holds one part


def decoded(outlet: Outlet) -> Frame:
    taken = outlet.take()
    assert taken is not None
    frame = Frame.FromString(taken.frame())
    stream, count, token = token_columns(frame)
    assert len(token) == taken.tokens
    frame_tokens: dict[int, list[int]] = {}
    start = 0
    for at, number in enumerate(stream.tolist()):
        length = 1 if count is None else int(count[at])
        frame_tokens.setdefault(number, []).extend(token[start : start + length].tolist())
        start += length
    decoded.tokens = frame_tokens
    return frame


def test_one_part_is_one_frame_without_counts() -> None:
    outlet = Outlet()
    outlet.push(frame_part([4, 5], [40, 50]))
    frame = decoded(outlet)
    assert decoded.tokens == {4: [40], 5: [50]}
    assert not frame.count
    assert outlet.take() is None


def test_parts_merge_in_order_with_their_finishes() -> None:
    outlet = Outlet()
    outlet.push(frame_part([4, 5], [40, 50]))
    outlet.push(frame_part([4, 5], [41, 42, 51], counts=[2, 1]))
    outlet.push(frame_part([5], [52], finishes=[pb.Finish(stream=5, reason=pb.FINISH_REASON_STOP)]))
    frame = decoded(outlet)
    assert decoded.tokens == {4: [40, 41, 42], 5: [50, 51, 52]}
    assert [finish.stream for finish in frame.finish] == [5]


def test_a_large_backlog_is_split_and_each_finish_comes_after_its_tokens() -> None:
    outlet = Outlet()
    steps = 5
    for step in range(steps):
        outlet.push(frame_part([1], [step] * (HALF), counts=[HALF]))
    outlet.push(frame_part(finishes=[pb.Finish(stream=1)]))
    seen, finished_at = 0, []
    frames = 0
    while not outlet.idle:
        frame = decoded(outlet)
        frames += 1
        seen += len(decoded.tokens.get(1, []))
        finished_at += [seen for _ in frame.finish]
        assert len(frame.SerializeToString()) < 4 * 2**20
    assert frames >= 3
    assert finished_at == [steps * (HALF)]


async def test_a_split_backlog_keeps_the_writer_awake() -> None:
    outlet = Outlet()
    for _ in range(3):
        outlet.push(frame_part([1], [7] * 2 * HALF, counts=[2 * HALF]))
    await outlet.wait()
    taken = 0
    while taken < 3:
        assert outlet.take() is not None
        taken += 1
        if taken < 3:
            await outlet.wait()
    assert outlet.take() is None


def test_refusals_that_nobody_reads_are_bounded_and_come_out_in_bounded_frames() -> None:
    outlet = Outlet()
    for number in range(LOOSE_FINISHES + 1):
        assert not outlet.overrun
        outlet.finish(pb.Finish(stream=number))
    assert outlet.overrun
    seen = 0
    while (taken := outlet.take()) is not None:
        raw = taken.frame()
        assert len(raw) <= MAX_FRAME_BYTES
        seen += len(Frame.FromString(raw).finish)
    assert seen == LOOSE_FINISHES + 1
    assert not outlet.overrun


def test_load_rides_on_the_next_frame_once() -> None:
    outlet = Outlet()
    outlet.state_load(pb.Load(running=3))
    outlet.push(frame_part([1], [9]))
    assert decoded(outlet).load.running == 3
    outlet.push(frame_part([1], [9]))
    assert not decoded(outlet).HasField("load")
    outlet.state_load(pb.Load(running=4))
    assert decoded(outlet).load.running == 4


def test_a_closed_outlet_drops_what_waits_and_takes_no_more() -> None:
    outlet = Outlet()
    outlet.push(frame_part([1], [9]))
    outlet.close()
    outlet.push(frame_part([1], [9]))
    assert outlet.take() is None


def test_reports_of_use_wait_up_to_their_bound_and_leave_in_bounded_frames() -> None:
    outlet = Outlet()
    for _ in range(WAITING_USAGE + 1):
        outlet.state_usage(pb.LeaseUsage())
    reported = []
    while (taken := outlet.take()) is not None:
        reported.append(len(taken.usage))
    assert reported == [FRAME_USAGE] * (WAITING_USAGE // FRAME_USAGE)


def test_a_closed_outlet_takes_no_report_of_use() -> None:
    outlet = Outlet()
    outlet.state_usage(pb.LeaseUsage())
    outlet.close()
    outlet.state_usage(pb.LeaseUsage())
    assert outlet.take() is None
