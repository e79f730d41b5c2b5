"""Whatever frames come, every client gets every token of its streams once and in order, and the history has them."""

from __future__ import annotations

import random
from collections import defaultdict

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from megatoken.router.intake.demux import sort_frame
from megatoken.router.streams.history import PAGE, TokenPages
from megatoken.router.streams.slots import DIRECT, NOBODY, SlotTable
from megatoken.tokens import wire
from megatoken.tokens.frames import U32, MalformedFrame, token_columns
from megatoken.tokens.outbox import FrameOutbox, FramePart, encode_frame
from megatoken.v1 import frame_columns_pb2, tokens_pb2

REPLICAS = 3


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_every_token_reaches_its_client_once_and_in_order(data: st.DataObject) -> None:
    slots = SlotTable(4)  # grows under way
    pages = TokenPages(slots, pages=2)
    rng = random.Random(data.draw(st.integers(0, 2**32)))
    sinks = data.draw(st.integers(1, 4))
    streams = []  # slot, sink, client's number, replica
    for number in range(data.draw(st.integers(1, 12))):
        sink = rng.choice([*range(sinks), DIRECT, NOBODY])
        replica = rng.randrange(REPLICAS)
        slot = slots.take(replica, sink, 1000 + number, object(), 0.0)
        streams.append((slot, sink, 1000 + number, replica))
    sent: dict[int, list[int]] = defaultdict(list)
    got: dict[tuple[int, int], list[int]] = defaultdict(list)
    direct: dict[int, list[int]] = defaultdict(list)
    outboxes = [FrameOutbox() for _ in range(sinks)]
    for turn in range(data.draw(st.integers(1, 6))):
        entries = []
        for _ in range(data.draw(st.integers(1, 12))):
            slot, _, _, replica = rng.choice(streams)
            run = 1 if rng.random() < 0.7 else rng.choice([0, 2, 3, PAGE, 70, 3 * PAGE])
            liar = rng.random() < 0.1
            entries.append((slot, run, (replica + liar) % REPLICAS, liar))
        if rng.random() < 0.5:
            entries = [(slot, 1, sender, liar) for slot, _, sender, liar in entries]
        values = [[rng.randrange(2**32) for _ in range(run)] for _, run, _, _ in entries]
        stream = np.array([slot for slot, *_ in entries], U32)
        token = np.array([value for row in values for value in row], U32)
        plain = all(run == 1 for _, run, _, _ in entries)
        count = None if plain and rng.random() < 0.8 else np.array([run for _, run, _, _ in entries], U32)
        sender = np.array([sender for _, _, sender, _ in entries])
        for (slot, _, _, liar), row in zip(entries, values, strict=True):
            if not liar:
                sent[slot] += row
        found = sort_frame(slots, pages, sender, stream, count, token, float(turn))
        for index, numbers, counts, tokens in found.parts:
            outboxes[index].add_part(FramePart(numbers, counts, tokens, [], []))
        for slot, packed in found.direct:
            direct[slot] += np.frombuffer(packed, U32).tolist()
        if rng.random() < 0.6:
            deliver(outboxes, got)
    deliver(outboxes, got)
    for slot, sink, number, _ in streams:
        if sink == NOBODY:
            assert int(slots.generated[slot]) == 0
            continue
        assert int(slots.generated[slot]) == len(sent[slot])
        history = pages.read(slot, 0, len(sent[slot])).tolist()
        assert history == sent[slot]
        if len(sent[slot]) > 3:
            assert pages.read(slot, 2, len(sent[slot]) - 1).tolist() == sent[slot][2:-1]
        assert (direct[slot] if sink == DIRECT else got[sink, number]) == sent[slot]
    for slot, *_ in streams:
        pages.free(slot)
        slots.free(slot)
    assert slots.taken == 0
    pages._reclaim()
    assert pages.pages_in_use == 0


def deliver(outboxes: list[FrameOutbox], got: dict[tuple[int, int], list[int]]) -> None:
    """Decodes what each client gets, with the contract's own generated code."""
    for index, outbox in enumerate(outboxes):
        while outbox:
            frame = tokens_pb2.Frame.FromString(outbox.take())
            at = 0
            counts = list(frame.count) or [1] * len(frame.stream)
            for number, count in zip(frame.stream, counts, strict=True):
                got[index, number] += frame.token[at : at + count]
                at += count
            assert at == len(frame.token)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_a_frame_or_a_clear_error(raw: bytes) -> None:
    slots = SlotTable(8)
    pages = TokenPages(slots)
    try:
        frame = frame_columns_pb2.Frame.FromString(raw)
    except DecodeError:
        return
    try:
        stream, count, token = token_columns(frame)
        if len(stream):
            found = sort_frame(slots, pages, 0, stream, count, token, 0.0)
            assert not found.parts  # nobody has a slot
            assert not found.direct
    except MalformedFrame:
        return


def test_a_stream_number_out_of_range_is_malformed() -> None:
    slots = SlotTable(8)
    with pytest.raises(MalformedFrame, match="stream 8, but there are 8"):
        sort_frame(slots, TokenPages(slots), 0, np.array([8], U32), None, np.array([1], U32), 0.0)


@given(
    st.lists(st.tuples(st.integers(0, 2**32 - 1), st.binary(max_size=300)), max_size=5),
    st.lists(st.integers(0, 2**32 - 1)),
)
def test_hand_made_bytes_equal_the_generated_code(starts: list[tuple[int, bytes]], cancels: list[int]) -> None:
    expected = frame_columns_pb2.ClientFrame()
    raw = b""
    for stream, prompt in starts:
        request = frame_columns_pb2.GenerateRequest(model="m", prompt=prompt)
        expected.start.add(stream=stream, request=request)
        raw += wire.start(stream, request.SerializeToString())
    raw += wire.cancel(cancels)
    decoded = tokens_pb2.ClientFrame.FromString(wire.cancel(cancels))
    assert list(decoded.cancel) == cancels
    expected.cancel = np.array(cancels, U32).tobytes()
    assert frame_columns_pb2.ClientFrame.FromString(raw) == expected


@given(st.integers(0, 2**63 - 1))
def test_varints_decode(value: int) -> None:
    raw = b"\x20" + wire.varint(value)  # Load.prompt_tokens = 4
    assert tokens_pb2.Load.FromString(raw).prompt_tokens == value


def test_a_large_outbox_becomes_several_frames_a_client_may_receive() -> None:
    outbox = FrameOutbox()
    for start in range(0, 1_000_000, 50_000):
        tokens = np.arange(start, start + 50_000, dtype=U32)
        outbox.add_part(FramePart(np.zeros(50_000, U32), None, tokens, [], []))
    outbox.add_finish(tokens_pb2.Finish(stream=0, reason=1).SerializeToString())
    tokens: list[int] = []
    ends = 0
    while outbox:
        raw = outbox.take()
        assert len(raw) < 4 << 20
        frame = frame_columns_pb2.Frame.FromString(raw)
        assert not ends
        tokens += token_columns(frame)[2].tolist()
        ends += len(frame.finish)
    assert tokens == list(range(1_000_000))
    assert ends == 1


def test_counts_are_filled_in_where_only_some_parts_have_them() -> None:
    plain = FramePart(np.array([1, 2], U32), None, np.array([10, 20], U32), [], [])
    counted = FramePart(np.array([1], U32), np.array([2], U32), np.array([11, 12], U32), [], [])
    frame = tokens_pb2.Frame.FromString(encode_frame([plain, counted]))
    assert (list(frame.stream), list(frame.count), list(frame.token)) == ([1, 2, 1], [1, 1, 2], [10, 20, 11, 12])


def test_what_waits_for_a_slow_client_pins_no_received_memory() -> None:
    outbox = FrameOutbox()
    expected = []
    for i in range(1000):
        frame = np.arange(10_000, dtype=U32)  # the frame of many clients: 40 kB
        outbox.add_part(FramePart(frame[:2], None, frame[i : i + 2], [], []))
        expected += [i, i + 1]
    pinned = {id(part.token.base) for part in outbox._parts if part.token is not None and part.token.base is not None}
    assert len(pinned) < 64
    assert len(outbox._parts) < 64 + 1000 / 64
    tokens: list[int] = []
    while outbox:
        tokens += token_columns(frame_columns_pb2.Frame.FromString(outbox.take()))[2].tolist()
    assert tokens == expected
