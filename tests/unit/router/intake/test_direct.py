"""Tokens that go to their request: Generate, the first of an attempt, a replay, and held delivery."""

from __future__ import annotations

import pytest

from megatoken.router.core.request import Request
from megatoken.router.streams.slots import DIRECT
from megatoken.v1 import tokens_pb2
from tests.support.router_core import CoreFleet

SEEDED = {"seed": 5, "temperature": 1.0}


def rows(slot: int, *ranks: int, width: int = 2) -> tokens_pb2.Detail:
    """A Detail of one row a rank, whose tokens are 10 * rank and on."""
    token = [10 * rank + i for rank in ranks for i in range(width)]
    values = tokens_pb2.Logprobs(width=width, token=token, logprob=[float(one) for one in token], rank=ranks)
    return tokens_pb2.Detail(stream=slot, logprobs=values, prompt_logprobs=tokens_pb2.Logprobs(width=width))


def details_of(fleet: CoreFleet, request: Request) -> list[tokens_pb2.Detail]:
    fleet.collect()
    return [detail for frame in fleet.frames for detail in frame.detail if detail.stream == request.stream]


def replaying(fleet: CoreFleet, *tokens: int, **fields: object) -> Request:
    """A seeded request that had these tokens when its replica was lost."""
    request = fleet.submit(max_tokens=50, **SEEDED, **fields)
    fleet.tokens(request, *tokens)
    fleet.lose(fleet.replica_of(request))
    return request


def test_a_call_s_tokens_stay_with_its_own_sink() -> None:
    fleet = CoreFleet(replicas=1)
    fleet.sink.index = DIRECT
    request = fleet.submit()
    for token in (1, 2):
        fleet.tokens(request, token)
        assert int(fleet.state.slots.sink[request.slot]) == DIRECT
    assert fleet.received(request) == [1, 2]
    assert fleet.state.ledger.delivered_tokens == 2


def test_a_stream_that_moved_goes_with_all_others_after_its_first_token() -> None:
    fleet = CoreFleet(replicas=2)
    request = fleet.submit()
    fleet.tokens(request, 1)
    fleet.lose(fleet.replica_of(request))
    assert int(fleet.state.slots.sink[request.slot]) == DIRECT
    fleet.tokens(request, 2, 3)
    assert int(fleet.state.slots.sink[request.slot]) == fleet.sink.index
    fleet.tokens(request, 4)
    assert fleet.received(request) == [1, 2, 3, 4]
    assert fleet.state.ledger.delivered_tokens == 4


@pytest.mark.parametrize(
    ("pieces", "got", "done"),
    [
        ([(1, 2)], [], False),
        ([(1, 2), (3,)], [], True),
        ([(1, 2, 3)], [], True),
        ([(1, 2, 3, 4)], [4], True),
        ([(1,), (2, 3, 4, 5)], [4, 5], True),
        ([(1, 2), (3, 4), (5,)], [4, 5], True),
    ],
)
def test_a_replay_swallows_what_the_client_has_and_passes_on_the_rest(
    pieces: list[tuple[int, ...]], got: list[int], done: bool
) -> None:
    fleet = CoreFleet(replicas=2)
    request = replaying(fleet, 1, 2, 3)
    for piece in pieces:
        fleet.tokens(request, *piece)
    assert fleet.received(request) == [1, 2, 3, *got]
    assert fleet.state.ledger.delivered_tokens == 3 + len(got)
    assert (request.replayed == b"") is done
    assert int(fleet.state.slots.sink[request.slot]) == (fleet.sink.index if got else DIRECT)


@pytest.mark.parametrize("pieces", [[(9,)], [(1, 9)], [(1,), (2, 9)], [(1, 2), (9, 3)]])
def test_a_replay_that_differs_goes_on_from_what_the_client_has(pieces: list[tuple[int, ...]]) -> None:
    fleet = CoreFleet(replicas=3)
    request = replaying(fleet, 1, 2, 3)
    replica, slot = fleet.replica_of(request), request.slot
    for piece in pieces:
        fleet.tokens(request, *piece)
    assert request.replay is False
    assert request.resume_note == "seeded sampling restarted: the tokens made again differed from those sent"
    assert fleet.link(replica).cancelled == [slot], "its worker is told, since it still makes tokens"
    assert fleet.received(request) == [1, 2, 3]
    assert list(fleet.started(request).prompt)[3:] == [1, 2, 3]
    fleet.tokens(request, 4)
    assert fleet.received(request) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("details", "kept"),
    [
        ([(1, 2, 3)], []),
        ([(1, 2, 3, 4)], [(4,)]),
        ([(1, 2), (3, 4)], [(4,)]),
        ([(1,), (2,), (3,), (4,)], [(4,)]),
        ([(1,), (2, 3, 4)], [(4,)]),
        ([(1, 2, 3), (4,)], [(4,)]),
        ([(1, 2, 3, 4), (5,)], [(4,), (5,)]),
    ],
)
def test_rows_of_tokens_that_the_client_has_are_dropped_one_detail_after_the_other(
    details: list[tuple[int, ...]], kept: list[tuple[int, ...]]
) -> None:
    fleet = CoreFleet(replicas=2)
    request = replaying(fleet, 1, 2, 3)
    sent = [rows(request.slot, *ranks) for ranks in details]
    fleet.frame(fleet.replica_of(request), stream=[request.slot], count=[5], token=[1, 2, 3, 4, 5], detail=sent)
    found = details_of(fleet, request)
    assert [tuple(detail.logprobs.rank) for detail in found] == kept
    for detail, ranks in zip(found, kept, strict=True):
        assert list(detail.logprobs.token) == [10 * rank + i for rank in ranks for i in range(2)]
        assert list(detail.logprobs.logprob) == [10.0 * rank + i for rank in ranks for i in range(2)]
        assert not detail.HasField("prompt_logprobs")


def test_rows_count_from_the_last_piece_of_a_replay_on() -> None:
    fleet = CoreFleet(replicas=2)
    request = replaying(fleet, 1, 2, 3)
    replica, slot = fleet.replica_of(request), request.slot
    fleet.frame(replica, stream=[slot], count=[2], token=[1, 2], detail=[rows(slot, 1, 2)])
    assert details_of(fleet, request) == []
    fleet.frame(replica, stream=[slot], count=[3], token=[3, 4, 5], detail=[rows(slot, 3, 4, 5)])
    assert [tuple(detail.logprobs.rank) for detail in details_of(fleet, request)] == [(4, 5)]


@pytest.mark.parametrize(
    ("delivery", "holds"), [(tokens_pb2.DELIVERY_COALESCE, 1), (tokens_pb2.DELIVERY_FIRST_THEN_ALL, 0)]
)
def test_held_delivery_gives_the_first_token_at_once_and_coalesced_ones_are_due_once(delivery: int, holds: int) -> None:
    fleet = CoreFleet(replicas=1)
    request = fleet.submit(delivery=delivery, max_delay_ms=250)
    fleet.tokens(request, 1)
    assert (fleet.received(request), len(fleet.state.holds), request.hold_due) == ([1], 0, False)
    for token in (2, 3):
        fleet.tokens(request, token)
        assert (fleet.received(request), len(fleet.state.holds), request.hold_due) == ([1], holds, bool(holds))
    assert list(fleet.state.holds.pop_until(fleet.now + 0.249)) == []
    assert list(fleet.state.holds.pop_until(fleet.now + 0.25)) == [request] * holds
    assert int(fleet.state.slots.sink[request.slot]) == DIRECT


def test_rows_of_held_tokens_are_kept_in_order_until_their_tokens_go() -> None:
    fleet = CoreFleet(replicas=1)
    request = fleet.submit(delivery=tokens_pb2.DELIVERY_FIRST_THEN_ALL)
    for rank in (1, 2, 3):
        fleet.frame(fleet.replicas[0], stream=[request.slot], token=[rank], detail=[rows(request.slot, rank)])
    assert [list(detail.logprobs.rank) for detail in details_of(fleet, request)] == [[1]]
    fleet.finish(request)
    assert [list(detail.logprobs.rank) for detail in details_of(fleet, request)] == [[1], [2], [3]]


@pytest.mark.parametrize("delivery", [tokens_pb2.DELIVERY_COALESCE, tokens_pb2.DELIVERY_FIRST_THEN_ALL])
def test_held_tokens_of_a_replay_wait_until_it_is_through(delivery: int) -> None:
    fleet = CoreFleet(replicas=2)
    request = replaying(fleet, 1, 2, delivery=delivery)
    fleet.tokens(request, 1)
    assert (fleet.received(request), len(fleet.state.holds)) == ([1, 2], 0)
    fleet.tokens(request, 2, 3)
    fleet.finish(request)
    assert fleet.received(request) == [1, 2, 3]
