"""Details of tokens: which slots' are taken, under which number, and on what way they go to the client."""

from __future__ import annotations

import pytest

from megatoken.router.intake.details import details_by_slot, take_column_details, take_lone_details
from megatoken.router.streams.slots import DIRECT
from megatoken.v1 import frame_columns_pb2, tokens_pb2
from tests.support.router_core import CoreFleet


def values(*ranks: int) -> tokens_pb2.Logprobs:
    return tokens_pb2.Logprobs(width=1, token=ranks, logprob=[0.0] * len(ranks), rank=ranks)


def frame_of(*details: tokens_pb2.Detail) -> frame_columns_pb2.Frame:
    raw = tokens_pb2.Frame(detail=details).SerializeToString()
    return frame_columns_pb2.Frame.FromString(raw)


def client_details(fleet: CoreFleet) -> list[tuple[int, list[int], list[int]]]:
    """Stream, ranks of tokens and ranks of the prompt's tokens of all that the client got."""
    fleet.collect()
    found = [detail for frame in fleet.frames for detail in frame.detail]
    return [(one.stream, list(one.logprobs.rank), list(one.prompt_logprobs.rank)) for one in found]


def test_details_are_taken_by_slot_with_the_client_s_number_and_only_from_the_slot_s_replica() -> None:
    fleet = CoreFleet(replicas=2)
    requests = [fleet.submit() for _ in range(4)]
    here, there = fleet.replicas
    own = [request for request in requests if request.replica is here]
    foreign = next(request for request in requests if request.replica is there)
    orphan = own[1].slot
    fleet.cancel(own[1])
    size = fleet.state.slots.size
    streams = [own[0].slot, foreign.slot, orphan, size - 1, size, size + 1, own[0].slot]
    frame = frame_of(*(tokens_pb2.Detail(stream=stream, logprobs=values(i)) for i, stream in enumerate(streams)))
    found = details_by_slot(fleet.state, here, frame)
    assert list(found) == [own[0].slot]
    decoded = [tokens_pb2.Detail.FromString(raw) for raw in found[own[0].slot]]
    assert [(one.stream, list(one.logprobs.rank)) for one in decoded] == [(own[0].stream, [0]), (own[0].stream, [6])]


def test_the_prompt_s_rows_that_the_client_has_are_left_out() -> None:
    fleet = CoreFleet(replicas=1)
    request = fleet.submit()
    request.prompt_rows = 2
    details = [
        tokens_pb2.Detail(stream=request.slot, prompt_logprobs=values(1)),
        tokens_pb2.Detail(stream=request.slot, prompt_logprobs=values(2, 3)),
    ]
    found = details_by_slot(fleet.state, fleet.replicas[0], frame_of(*details))
    decoded = [tokens_pb2.Detail.FromString(raw) for raw in found[request.slot]]
    assert [list(one.prompt_logprobs.rank) for one in decoded] == [[3]]


def test_a_session_takes_the_details_of_its_own_slots_and_leaves_the_others() -> None:
    fleet = CoreFleet(replicas=1)
    mine, other, direct = (fleet.submit() for _ in range(3))
    fleet.state.slots.sink[other.slot] = 1
    fleet.state.slots.sink[direct.slot] = DIRECT
    details = {mine.slot: [b"a", b"b"], other.slot: [b"c"], direct.slot: [b"d"]}
    assert take_column_details(fleet.state, 0, details) == [b"a", b"b"]
    assert details == {other.slot: [b"c"], direct.slot: [b"d"]}
    assert take_column_details(fleet.state, 0, {}) == []


@pytest.mark.parametrize("way", ["session", "call", "held", "replay", "left"])
def test_details_without_a_token_go_at_once_wait_for_held_tokens_or_are_dropped_in_a_replay(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = CoreFleet(replicas=1)
    if way == "call":
        fleet.sink.index = DIRECT
    request = fleet.submit(delivery=tokens_pb2.DELIVERY_COALESCE if way == "held" else 0)
    if way == "replay":
        request.replayed = b"1234"
    if way == "left":
        fleet.state.sinks[0] = None
    woken: list[int] = []
    monkeypatch.setattr(fleet.sink, "wake", lambda: woken.append(1))
    raw = tokens_pb2.Detail(stream=request.stream, prompt_logprobs=values(1, 2)).SerializeToString()
    take_lone_details(fleet.state, request, [raw])
    passed = way in ("session", "call")
    assert client_details(fleet) == ([(request.stream, [], [1, 2])] if passed else [])
    assert bool(woken) is passed
    assert request.held_details == ([raw] if way == "held" else [])
    take_lone_details(fleet.state, request, [raw])
    assert request.held_details == ([raw, raw] if way == "held" else [])
