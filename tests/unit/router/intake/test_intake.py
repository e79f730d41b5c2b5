"""Frames arrive: in which order they are taken, what is a sign of life, and what follows from each of their parts."""

from __future__ import annotations

import pytest

from megatoken.router.core.lifecycle import RequestState
from megatoken.router.fleet.fleet import Endpoint
from megatoken.router.intake.arrival import decode
from megatoken.router.intake.intake import on_frames
from megatoken.tokens.frames import MalformedFrame
from megatoken.v1 import tokens_pb2
from tests.support.router_core import STOP, CoreFleet


def encoded(replica: Endpoint, **fields: object) -> tuple[Endpoint, bytes]:
    return replica, tokens_pb2.Frame(**fields).SerializeToString()  # type: ignore[arg-type]


def test_frames_of_one_replica_keep_their_order_among_those_of_others() -> None:
    fleet = CoreFleet(replicas=2)
    requests = [fleet.submit() for _ in range(2)]
    first, second = (fleet.replica_of(request) for request in requests)
    batch = [
        encoded(replica, stream=[request.slot], token=[token])
        for replica, request, token in (
            (first, requests[0], 1), (first, requests[0], 2), (second, requests[1], 7),
            (first, requests[0], 3), (second, requests[1], 8), (second, requests[1], 9),
        )
    ]  # fmt: skip
    on_frames(fleet.state, batch, fleet.now)
    assert [fleet.received(request) for request in requests] == [[1, 2, 3], [7, 8, 9]]
    assert fleet.state.frames == 6


def test_tokens_are_a_sign_of_life_and_neither_ends_nor_a_first_report_are() -> None:
    fleet = CoreFleet(replicas=3)
    requests = [fleet.submit() for _ in range(3)]
    replicas = [fleet.replica_of(request) for request in requests]
    batch = [
        encoded(replicas[0], stream=[requests[0].slot], token=[1]),
        encoded(replicas[1], finish=[tokens_pb2.Finish(stream=requests[1].slot, reason=STOP)]),
        encoded(replicas[2], load=tokens_pb2.Load(running=1, steps=3)),
    ]
    on_frames(fleet.state, batch, fleet.now + 2)
    assert [replica.alive_s for replica in replicas] == [102.0, 100.0, 100.0]


def test_an_empty_batch_and_an_empty_frame_change_nothing() -> None:
    fleet = CoreFleet(replicas=1)
    on_frames(fleet.state, [], fleet.now)
    on_frames(fleet.state, [encoded(fleet.replicas[0])], fleet.now)
    assert (fleet.state.frames, fleet.replicas[0].connected) == (0, True)


def test_a_frame_of_a_session_that_was_lost_is_not_taken() -> None:
    fleet = CoreFleet(replicas=1)
    request = fleet.submit()
    fleet.replicas[0].connected = False
    on_frames(fleet.state, [encoded(fleet.replicas[0], stream=[request.slot], token=[1])], fleet.now)
    assert fleet.received(request) == []


def test_details_of_several_replicas_in_one_batch_go_with_their_own_tokens_or_alone() -> None:
    fleet = CoreFleet(replicas=2)
    requests = [fleet.submit() for _ in range(2)]
    row = tokens_pb2.Logprobs(width=1, token=[1], logprob=[0.0], rank=[1])
    batch = [
        encoded(
            fleet.replica_of(request),
            stream=[request.slot] if i else [],
            token=[5] if i else [],
            detail=[tokens_pb2.Detail(stream=request.slot, logprobs=row)],
        )
        for i, request in enumerate(requests)
    ]
    on_frames(fleet.state, batch, fleet.now)
    fleet.collect()
    found = [detail.stream for frame in fleet.frames for detail in frame.detail]
    assert sorted(found) == [one.stream for one in requests]


@pytest.mark.parametrize("part", ["finish", "load"])
def test_room_that_a_finish_or_a_report_makes_is_given_to_who_waits(part: str) -> None:
    fleet = CoreFleet(replicas=1, max_running=1, admission={"replica_slack": 1.0})
    replica = fleet.replicas[0]
    if part == "load":
        fleet.frame(replica, load=tokens_pb2.Load(running=1))
        waiting = fleet.submit()
        fleet.frame(replica, load=tokens_pb2.Load(running=0))
    else:
        running, waiting = fleet.submit(), fleet.submit()
        assert waiting.state is RequestState.QUEUED
        fleet.finish(running)
    assert waiting.state is RequestState.RUNNING


def test_every_lease_s_usage_is_handed_on_and_who_waits_is_placed() -> None:
    fleet = CoreFleet(replicas=1, max_running=1, admission={"replica_slack": 1.0})
    replica = fleet.replicas[0]
    replica.leased = 1
    fleet.state.fleet.refresh(replica, fleet.now)
    waiting = fleet.submit()
    seen: list[tuple[str, float]] = []

    def give_back(reporter: Endpoint, _usage: tokens_pb2.LeaseUsage, now: float) -> None:
        seen.append((reporter.name, now))
        replica.leased = 0
        fleet.state.fleet.refresh(replica, now)

    fleet.frame(replica, usage=[tokens_pb2.LeaseUsage(), tokens_pb2.LeaseUsage()])
    assert (seen, waiting.state) == ([], RequestState.QUEUED)
    fleet.state.on_lease_usage = give_back
    fleet.frame(replica, usage=[tokens_pb2.LeaseUsage(), tokens_pb2.LeaseUsage()])
    assert (seen, waiting.state) == ([("m-0", 100.0)] * 2, RequestState.RUNNING)


@pytest.mark.parametrize("part", ["leases", "load"])
def test_a_fault_in_a_usage_or_a_report_is_counted_and_costs_nobody(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = CoreFleet(replicas=1)
    caught: list[str] = []
    fleet.state.faults.caught = lambda where, error: caught.append(where)  # type: ignore[method-assign]
    fleet.state.on_lease_usage = lambda *_: 1 / 0  # type: ignore[assignment,return-value]
    request = fleet.submit()
    if part == "leases":
        fleet.frame(fleet.replicas[0], usage=[tokens_pb2.LeaseUsage()])
    else:
        monkeypatch.setattr("megatoken.router.intake.intake.take_load", lambda *_: 1 / 0)
        fleet.frame(fleet.replicas[0], load=tokens_pb2.Load(running=1))
    assert (caught, request.state, fleet.replicas[0].connected) == ([part], RequestState.RUNNING, True)


def test_a_replica_that_is_given_up_costs_no_other_of_the_same_moment_its_tokens_or_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fleet = CoreFleet(replicas=2, resume={"max_resumes": 0})
    fleet.state.faults.caught = lambda where, error: None  # type: ignore[method-assign]
    bad, good = fleet.submit(), fleet.submit()
    monkeypatch.setattr("megatoken.router.intake.intake.details_by_slot", lambda *_: 1 / 0)
    batch = [
        encoded(fleet.replica_of(bad), detail=[tokens_pb2.Detail(stream=bad.slot)], stream=[bad.slot], token=[7]),
        encoded(
            fleet.replica_of(good),
            stream=[good.slot],
            token=[8],
            finish=[tokens_pb2.Finish(stream=good.slot, reason=STOP)],
        ),
    ]
    on_frames(fleet.state, batch, fleet.now)
    assert (fleet.received(bad), fleet.received(good)) == ([], [8])
    end = fleet.end(good)
    assert end is not None
    assert end.reason == STOP


@pytest.mark.parametrize(("beyond", "refused"), [(-1, False), (0, True), (1, True)])
def test_a_stream_beyond_the_slots_is_malformed(beyond: int, refused: bool) -> None:
    fleet = CoreFleet()
    request = fleet.submit()
    replica = fleet.replica_of(request)
    _, raw = encoded(replica, stream=[fleet.state.slots.size + beyond], token=[1])
    if not refused:
        assert decode(fleet.state, replica, raw).stream.tolist() == [fleet.state.slots.size - 1]
        return
    with pytest.raises(MalformedFrame, match=f"but there are {fleet.state.slots.size}"):
        decode(fleet.state, replica, raw)
