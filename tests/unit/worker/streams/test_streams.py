"""A step reaches each caller as that caller's own columns, whatever the mix of callers, counts and order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatoken.tokens.frames import U32, token_columns
from megatoken.v1 import tokens_pb2 as pb
from megatoken.v1.frame_columns_pb2 import Frame
from megatoken.worker.engines.engine import EngineRequest, EngineStep
from megatoken.worker.streams.outlet import Outlet
from megatoken.worker.streams.table import FIRST_SLOTS, Running, StreamTable


def running(outlet: Outlet, choices: int = 1) -> Running:
    request = EngineRequest("r", np.array([1], U32), pb.SamplingParams(), 10, choices=choices)
    return Running(request, outlet, 0.0, choices)


def received(outlet: Outlet) -> dict[int, list[int]]:
    tokens: dict[int, list[int]] = {}
    while (taken := outlet.take()) is not None:
        stream, count, token = token_columns(Frame.FromString(taken.frame()))
        start = 0
        for at, number in enumerate(stream.tolist()):
            length = 1 if count is None else int(count[at])
            tokens.setdefault(number, []).extend(token[start : start + length].tolist())
            start += length
    return tokens


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=60)
@given(data=st.data(), callers=st.integers(1, 4), streams=st.integers(1, 30))
def test_every_token_reaches_its_own_stream_once_and_in_order(data: st.DataObject, callers: int, streams: int) -> None:
    table = StreamTable()
    outlets = [Outlet() for _ in range(callers)]
    for outlet in outlets:
        table.open(outlet)
    sent: dict[tuple[int, int], list[int]] = {}
    slots = []
    for number in range(streams):
        owner = data.draw(st.integers(0, callers - 1))
        request = running(outlets[owner])
        table.allot(request, number)
        slots.append((request.request.slots[0], owner, number))
        sent[owner, number] = []
    for _ in range(data.draw(st.integers(1, 4))):
        moved = data.draw(st.lists(st.sampled_from(slots), unique=True, max_size=streams))
        counts = [data.draw(st.integers(1, 3)) for _ in moved]
        tokens = []
        for (_slot, owner, number), count in zip(moved, counts, strict=True):
            made = [len(tokens) * 7 + at + number for at in range(count)]
            sent[owner, number] += made
            tokens += made
        step = EngineStep(
            np.array([slot for slot, _, _ in moved], U32),
            np.array(tokens, U32),
            count=None if all(count == 1 for count in counts) else np.array(counts, U32),
        )
        if len(step.slot):
            table.advance(step, 1.0)
        table.split(step, {})
    for owner, outlet in enumerate(outlets):
        got = received(outlet)
        for number in range(streams):
            assert got.get(number, []) == sent.get((owner, number), [])


def test_the_table_grows_and_reuses_slots() -> None:
    table, outlet = StreamTable(), Outlet()
    table.open(outlet)
    requests = [running(outlet) for _ in range(1000)]
    for number, request in enumerate(requests):
        table.allot(request, number)
    assert table.live == 1000
    assert len({request.request.slots[0] for request in requests}) == 1000
    assert len(list(table.all())) == 1000
    for request in requests:
        table.free(request.request.slots[0])
    assert table.live == 0
    assert not outlet.slots
    with pytest.raises(LookupError):
        table[requests[0].request.slots[0]]


def test_choices_take_consecutive_numbers() -> None:
    table, outlet = StreamTable(), Outlet()
    table.open(outlet)
    request = running(outlet, choices=3)
    table.allot(request, 2**32 - 1)
    assert sorted(outlet.slots) == [0, 1, 2**32 - 1]
    assert len(list(table.all())) == 1


def test_a_finish_of_a_stream_without_tokens_in_the_step_still_goes_out() -> None:
    table, one, other = StreamTable(), Outlet(), Outlet()
    table.open(one)
    table.open(other)
    first, second = running(one), running(other)
    table.allot(first, 1)
    table.allot(second, 2)
    step = EngineStep(np.array([first.request.slots[0]], U32), np.array([5], U32))
    table.split(step, {other: [pb.Finish(stream=2).SerializeToString()]})
    assert received(one) == {1: [5]}
    taken = other.take()
    assert taken is not None
    assert pb.Finish.FromString(taken.parts[0].finishes[0]).stream == 2


def step_of(slots: list[int], counts: list[int] | None = None) -> EngineStep:
    tokens = np.arange(len(slots) if counts is None else sum(counts), dtype=U32)
    return EngineStep(np.array(slots, U32), tokens, count=None if counts is None else np.array(counts, U32))


def test_each_step_counts_its_tokens_and_the_time_since_the_last() -> None:
    table, outlet = StreamTable(), Outlet()
    table.open(outlet)
    first, second = running(outlet), running(outlet)
    first.arrived_s, second.arrived_s = 10.0, 11.0
    table.allot(first, 1)
    table.allot(second, 2)
    slots = [first.request.slots[0], second.request.slots[0]]
    gaps, began = table.advance(step_of(slots), 13.0)
    assert (gaps.tolist(), began.tolist()) == ([3.0, 2.0], [True, True])
    assert table.generated[slots].tolist() == [1, 1]
    gaps, began = table.advance(step_of(slots, [3, 2]), 14.5)
    assert (gaps.tolist(), began.tolist()) == ([1.5, 1.5], [False, False])
    assert table.generated[slots].tolist() == [4, 3]
    table.advance(step_of(slots[:1]), 15.0)
    assert table.generated[slots].tolist() == [5, 3]


def test_a_slot_begins_anew_with_its_next_request() -> None:
    table, outlet = StreamTable(), Outlet()
    table.open(outlet)
    old, new = running(outlet), running(outlet)
    table.allot(old, 1)
    slot = old.request.slots[0]
    table.advance(step_of([slot]), 1.0)
    assert table.holds(slot, old)
    table.free(slot)
    assert not table.holds(slot, old)
    table.allot(new, 2)
    assert new.request.slots == (slot,)
    assert table.holds(slot, new)
    assert not table.holds(slot, old)
    assert table.generated[slot] == 0


def test_the_table_grows_only_when_no_slot_is_free() -> None:
    table, outlet = StreamTable(), Outlet()
    table.open(outlet)
    for number in range(FIRST_SLOTS):
        table.allot(running(outlet), number)
    assert len(table.number) == FIRST_SLOTS
    table.allot(running(outlet), FIRST_SLOTS)
    assert len(table.number) == 2 * FIRST_SLOTS
    assert table.live == FIRST_SLOTS + 1


def test_a_slot_of_a_caller_that_is_gone_is_a_mistake_of_the_engine() -> None:
    table, outlet = StreamTable(), Outlet()
    table.open(outlet)
    request = running(outlet)
    table.allot(request, 1)
    table.close(outlet)
    assert table.outlets == []
    with pytest.raises(LookupError, match="caller 0 is gone"):
        table.split(step_of([request.request.slots[0]]), {})


def test_a_callers_place_is_given_to_the_next_caller() -> None:
    table, one, two, three = StreamTable(), Outlet(), Outlet(), Outlet()
    table.open(one)
    table.open(two)
    table.close(one)
    table.open(three)
    assert table.outlets == [two, three]
    requests = [running(two), running(three)]
    for number, request in enumerate(requests):
        table.allot(request, number)
    table.split(step_of([request.request.slots[0] for request in requests]), {})
    assert (received(two), received(three)) == ({0: [0]}, {1: [1]})
