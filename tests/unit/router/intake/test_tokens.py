"""The tokens of frames that came in one moment: what is counted for whom, what is urgent, and which gaps are timed."""

from __future__ import annotations

import pytest

from megatoken.router.fleet.fleet import Endpoint
from megatoken.router.intake.intake import on_frames
from megatoken.v1 import tokens_pb2
from tests.support.router_core import CoreFleet


def encoded(replica: Endpoint, *slots: int, count: list[int] | None = None) -> tuple[Endpoint, bytes]:
    """A frame of the replica in which each token is the number of its place."""
    made = len(slots) if count is None else sum(count)
    return replica, tokens_pb2.Frame(stream=slots, count=count or [], token=range(made)).SerializeToString()


@pytest.mark.parametrize(
    ("before", "frames", "timed"),
    [
        (0, 1, False), (62, 1, False), (63, 1, True), (64, 1, False), (127, 1, True),
        (61, 2, False), (62, 2, True), (63, 2, True), (64, 2, False),
    ],
)  # fmt: skip
def test_the_times_between_tokens_are_taken_once_in_64_frames(before: int, frames: int, timed: bool) -> None:
    fleet = CoreFleet(replicas=2)
    requests = [fleet.submit() for _ in range(2)]
    for request in requests:
        fleet.tokens(request, 1)
    fleet.state.frames = before
    fleet.now += 0.25
    first = fleet.pool.measures.between_tokens_s
    fleet_frames = [encoded(fleet.replica_of(request), request.slot) for request in requests]
    on_frames(fleet.state, fleet_frames[:frames], fleet.now)
    assert fleet.state.frames == before + frames
    assert (int(first.counts.sum()), first.sum) == (int(timed), 0.25 * timed)


def test_a_first_token_has_no_gap_before_it() -> None:
    fleet = CoreFleet(replicas=1)
    old, new = fleet.submit(), fleet.submit()
    fleet.tokens(old, 1)
    fleet.state.frames = 63
    fleet.now += 0.5
    on_frames(fleet.state, [encoded(fleet.replicas[0], old.slot, new.slot)], fleet.now)
    assert (int(fleet.pool.measures.between_tokens_s.counts.sum()), fleet.pool.measures.between_tokens_s.sum) == (
        1,
        0.5,
    )


def test_a_frame_of_first_tokens_alone_times_nothing() -> None:
    fleet = CoreFleet(replicas=1)
    request = fleet.submit()
    fleet.state.frames = 63
    fleet.tokens(request, 1)
    assert int(fleet.pool.measures.between_tokens_s.counts.sum()) == 0


@pytest.mark.parametrize("count", [None, [2, 3]])
def test_tokens_come_off_what_is_outstanding_and_are_counted_for_replica_model_and_ledger(
    count: list[int] | None,
) -> None:
    fleet = CoreFleet(replicas=1)
    requests = [fleet.submit(max_tokens=100) for _ in range(2)]
    replica = fleet.replicas[0]
    on_frames(fleet.state, [encoded(replica, *(r.slot for r in requests), count=count)], fleet.now)
    made = sum(count) if count else 2
    assert (replica.generated_tokens, fleet.pool.measures.generated_tokens) == (made, made)
    assert (fleet.state.ledger["generated_tokens"], fleet.state.ledger.delivered_tokens) == (made, made)
    assert replica.decode_outstanding == 200 - made


@pytest.mark.parametrize(("count", "made", "live"), [(None, 2, 1), ([3, 4], 7, 4)])
def test_tokens_of_an_orphan_were_made_by_its_replica_but_were_charged_to_nobody(
    count: list[int] | None, made: int, live: int
) -> None:
    fleet = CoreFleet(replicas=1)
    orphan, kept = fleet.submit(max_tokens=100), fleet.submit(max_tokens=100)
    replica, slots = fleet.replicas[0], (orphan.slot, kept.slot)
    fleet.cancel(orphan)
    assert replica.decode_outstanding == 100
    on_frames(fleet.state, [encoded(replica, *slots, count=count)], fleet.now)
    assert (replica.generated_tokens, fleet.pool.measures.generated_tokens) == (made, made)
    assert (fleet.state.ledger["generated_tokens"], fleet.state.ledger.delivered_tokens) == (made, live)
    assert replica.decode_outstanding == 100 - live
    assert fleet.state.ledger.foreign_tokens == 0


@pytest.mark.parametrize("counted", [False, True])
def test_a_foreign_stream_in_one_of_several_frames_spoils_no_other_count(counted: bool) -> None:
    fleet = CoreFleet(replicas=2)
    requests = [fleet.submit(max_tokens=100) for _ in range(4)]
    here, there = fleet.replicas
    own = [request for request in requests if request.replica is here]
    others = [request for request in requests if request.replica is there]
    frames = [
        encoded(here, own[0].slot, others[0].slot, own[1].slot, count=[2, 5, 4] if counted else None),
        encoded(there, others[0].slot, others[1].slot),
    ]
    on_frames(fleet.state, frames, fleet.now)
    made = 6 if counted else 2
    assert (here.generated_tokens, there.generated_tokens) == (made, 2)
    assert (here.decode_outstanding, there.decode_outstanding) == (200 - made, 198)
    assert fleet.state.ledger.foreign_tokens == (5 if counted else 1)
    assert fleet.state.ledger["generated_tokens"] == made + 2
    assert fleet.received(others[0]) == [0]
    assert fleet.received(own[1]) == ([7, 8, 9, 10] if counted else [2])


@pytest.mark.parametrize("counted", [(False, False), (True, False), (False, True), (True, True)])
def test_frames_with_and_without_counts_are_taken_together(counted: tuple[bool, bool]) -> None:
    fleet = CoreFleet(replicas=2)
    requests = [fleet.submit() for _ in range(2)]
    replicas = [fleet.replica_of(request) for request in requests]
    made = [3 if one else 1 for one in counted]
    frames = [
        encoded(replica, request.slot, count=[3] if one else None)
        for replica, request, one in zip(replicas, requests, counted, strict=True)
    ]
    for turn in (1, 2):
        on_frames(fleet.state, frames, fleet.now)
        assert [fleet.received(one) for one in requests] == [list(range(count)) * turn for count in made]
        assert [replica.generated_tokens for replica in replicas] == [count * turn for count in made]
        assert fleet.pool.measures.generated_tokens == sum(made) * turn
        assert fleet.state.frames == 2 * turn


def test_foreign_tokens_of_every_frame_are_counted() -> None:
    fleet = CoreFleet(replicas=2)
    request = fleet.submit()
    other = next(replica for replica in fleet.replicas if replica is not request.replica)
    for turn in (1, 2):
        on_frames(fleet.state, [encoded(other, request.slot)], fleet.now)
        assert (fleet.state.ledger.foreign_tokens, other.generated_tokens) == (turn, 0)


def test_a_first_token_is_urgent_and_a_later_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = CoreFleet(replicas=1)
    woken = []
    monkeypatch.setattr(fleet.sink, "wake", lambda: woken.append(fleet.sink.outbox.urgent))
    request = fleet.submit()
    fleet.tokens(request, 1)
    fleet.collect()
    fleet.tokens(request, 2)
    assert woken == [True, False]


@pytest.mark.parametrize("left", [0, 2])
def test_tokens_of_a_session_that_left_are_dropped_and_others_get_theirs(left: int) -> None:
    fleet = CoreFleet(replicas=1)
    gone, there = fleet.submit(), fleet.submit()
    fleet.state.sinks = [None, fleet.sink, None]
    fleet.state.slots.sink[gone.slot], fleet.state.slots.sink[there.slot] = left, 1
    on_frames(fleet.state, [encoded(fleet.replicas[0], gone.slot, there.slot)], fleet.now)
    assert (fleet.received(gone), fleet.received(there)) == ([], [1])
    assert fleet.state.ledger.delivered_tokens == 1


def test_direct_tokens_come_in_the_order_of_their_frame_with_their_own_details() -> None:
    fleet = CoreFleet(replicas=1)
    held = [fleet.submit(delivery=tokens_pb2.DELIVERY_FIRST_THEN_ALL) for _ in range(2)]
    row = tokens_pb2.Logprobs(width=1, token=[1], logprob=[0.0], rank=[4])
    detail = [tokens_pb2.Detail(stream=held[1].slot, logprobs=row)]
    fleet.frame(fleet.replicas[0], stream=[one.slot for one in held], count=[2, 1], token=[7, 8, 9], detail=detail)
    assert [fleet.received(one) for one in held] == [[7, 8], [9]]
    found = [(one.stream, list(one.logprobs.rank)) for frame in fleet.frames for one in frame.detail]
    assert found == [(held[1].stream, [4])]
