"""What waits for a caller goes out in order, in few frames that are not too large, and is copied only where it must."""

from __future__ import annotations

import numpy as np
import pytest

from megatoken.tokens.frames import U32, pack
from megatoken.tokens.outbox import MAX_FRAME_BYTES, FrameOutbox, FramePart, divided, encode_frame, tied
from megatoken.tokens.pieces import PIECE_BYTES
from megatoken.v1 import tokens_pb2 as pb
from megatoken.v1.frame_columns_pb2 import Frame
from tests.support.parts import frame_part

LOOSE = 64


def detail(stream: int, rows: int, width: int = 1, first: int = 0) -> pb.Detail:
    cells = rows * width
    return pb.Detail(
        stream=stream,
        logprobs=pb.Logprobs(width=width, token=[1] * cells, logprob=[1.0] * cells, rank=range(first, first + rows)),
    )


def finish(stream: int) -> pb.Finish:
    return pb.Finish(stream=stream, reason=1)


def bare(size: int, finishes: int = 1) -> FramePart:
    """A part of so many bytes in all."""
    return FramePart(None, None, None, [], [bytes(size // finishes)] * finishes)


def columns(part: FramePart) -> tuple[list[int], list[int] | None, list[int]]:
    assert part.stream is not None
    assert part.token is not None
    counts = None if part.counts is None else part.counts.tolist()
    return part.stream.tolist(), counts, part.token.tolist()


@pytest.mark.parametrize(
    ("part", "tokens", "size"),
    [
        (frame_part(), 0, 0),
        (frame_part([1], [5]), 1, 12),
        (frame_part([1, 2], [5, 6, 7], [2, 1]), 3, 28),
        (FramePart(None, None, None, [b"ab", b"c"], [b"defg"]), 0, 7),
        (FramePart(np.array([1], U32), None, np.array([1], U32), [b"ab"], [b"c"]), 1, 15),
    ],
)
def test_a_part_has_so_many_tokens_and_counts_as_so_many_bytes(part: FramePart, tokens: int, size: int) -> None:
    assert (part.tokens, part.size_bytes()) == (tokens, size)


def test_parts_are_one_frame_that_the_generated_code_reads() -> None:
    parts = [
        frame_part([1, 2], [11, 12], details=[detail(1, 1)], finishes=[finish(2)]),
        frame_part([1], [13, 14], [2]),
        frame_part([], [], finishes=[finish(1)]),
        frame_part([3], [15], details=[detail(3, 2)]),
    ]
    frame = pb.Frame.FromString(encode_frame(parts))
    assert (list(frame.stream), list(frame.count)) == ([1, 2, 1, 3], [1, 1, 2, 1])
    assert list(frame.token) == [11, 12, 13, 14, 15]
    assert [one.stream for one in frame.detail] == [1, 3]
    assert [one.stream for one in frame.finish] == [2, 1]


def test_counts_that_are_all_one_are_not_written() -> None:
    frame = Frame.FromString(encode_frame([frame_part([1], [11]), frame_part([2], [12])]))
    assert (frame.stream, frame.count, frame.token) == (pack([1, 2]), b"", pack([11, 12]))
    assert encode_frame([]) == b""


def test_tied_parts_have_the_same_content_in_memory_of_their_own() -> None:
    first = frame_part([1, 2], [11, 12], details=[detail(1, 1)])
    second = frame_part([3], [13, 14], [2], finishes=[finish(3)])
    made = tied([first, frame_part(finishes=[finish(9)]), second])
    assert columns(made) == ([1, 2, 3], [1, 1, 2], [11, 12, 13, 14])
    assert (made.details, made.finishes) == (first.details, [finish(9).SerializeToString(), *second.finishes])
    assert first.token is not None
    assert not np.shares_memory(made.token, first.token)
    assert columns(tied([first, first])) == ([1, 2, 1, 2], None, [11, 12, 11, 12])
    assert tied([frame_part(finishes=[finish(9)])]).stream is None


def test_an_outbox_says_what_waits_and_whether_it_is_urgent() -> None:
    outbox = FrameOutbox()
    assert (bool(outbox), outbox.urgent, outbox.refusals) == (False, False, 0)
    outbox.add_refusals([])
    assert (bool(outbox), outbox.urgent) == (False, False)
    outbox.add_part(frame_part([1], [2]))
    assert (bool(outbox), outbox.urgent, outbox.refusals) == (True, False, 0)
    outbox.add_finish(b"")
    assert (outbox.urgent, outbox.refusals) == (True, 0)
    outbox.add_refusals([b"a", b"b"])
    outbox.add_refusals([b"c"])
    assert outbox.refusals == 3
    assert len(outbox.take_parts()) == 4
    assert (bool(outbox), outbox.urgent, outbox.refusals) == (False, False, 0)
    assert outbox.take_parts() == []
    outbox.add_refusals([b"d"])
    assert (outbox.urgent, outbox.refusals) == (True, 1)
    outbox.clear()
    assert (bool(outbox), outbox.urgent, outbox.refusals) == (False, False, 0)


@pytest.mark.parametrize(
    ("sizes", "frames"),
    [
        ([MAX_FRAME_BYTES], [1]),
        ([MAX_FRAME_BYTES + 5], [1]),
        ([MAX_FRAME_BYTES - 5, 5], [2]),
        ([MAX_FRAME_BYTES - 5, 6], [1, 1]),
        ([6, MAX_FRAME_BYTES - 5], [1, 1]),
        ([400_000] * 5, [2, 2, 1]),
        ([1, MAX_FRAME_BYTES + 1, 1], [1, 1, 1]),
    ],
)
def test_a_frame_takes_as_many_parts_as_fit_and_one_at_least(sizes: list[int], frames: list[int]) -> None:
    outbox = FrameOutbox()
    for size in sizes:
        outbox.add_refusals([bytes(size)])
    taken = []
    while outbox:
        assert (outbox.urgent, outbox.refusals) == (True, len(sizes))
        taken.append(len(outbox.take_parts()))
    assert taken == frames


@pytest.mark.parametrize(
    ("parts", "kept"),
    [(1, [1]), (64, [1] * 64), (65, [64, 1]), (66, [64, 1, 1]), (128, [64] + [1] * 64), (129, [64, 64, 1])],
)
def test_parts_of_a_slow_caller_are_copied_into_one_every_64(parts: int, kept: list[int]) -> None:
    outbox = FrameOutbox()
    for number in range(parts):
        outbox.add_part(frame_part([number], [1000 + number]))
    taken = outbox.take_parts()
    assert [part.tokens for part in taken] == kept
    streams = [stream for part in taken for stream in columns(part)[0]]
    assert streams == list(range(parts))


@pytest.mark.parametrize("left", [0, 1, 30])
def test_only_what_is_still_a_view_is_copied(left: int) -> None:
    outbox = FrameOutbox()
    half = MAX_FRAME_BYTES // 2
    for _ in range(2):
        outbox.add_part(bare(half))
    for _ in range(left):
        outbox.add_part(frame_part([7], [7]))
    assert len(outbox.take_parts()) == 2
    for number in range(64 - left):
        outbox.add_part(frame_part([number], [number]))
    outbox.add_part(frame_part([8], [8]))
    assert [part.tokens for part in outbox.take_parts()] == [64, 1]


@pytest.mark.parametrize(
    ("size", "groups"),
    [
        (MAX_FRAME_BYTES // 16, [16, 16, 16, 16]),
        (MAX_FRAME_BYTES // 16 + 1, [15, 15, 15, 15, 4]),
        (MAX_FRAME_BYTES // 64, [64]),
        (MAX_FRAME_BYTES + 1, [1] * 64),
    ],
)
def test_copied_parts_are_no_larger_than_a_frame(size: int, groups: list[int]) -> None:
    outbox, one = FrameOutbox(), bytes(size)
    for _ in range(65):
        outbox.add_part(FramePart(None, None, None, [], [one]))
    assert [len(part.finishes) for part in outbox._parts] == [*groups, 1]


def test_what_was_copied_is_not_copied_again() -> None:
    outbox = FrameOutbox()
    for number in range(65):
        outbox.add_part(frame_part([number], [number]))
    first = outbox._parts[0]
    for number in range(100):
        outbox.add_part(frame_part([number], [number]))
    assert outbox._parts[0] is first


def test_after_a_clear_parts_are_counted_anew() -> None:
    outbox = FrameOutbox()
    for number in range(40):
        outbox.add_part(frame_part([number], [number]))
    outbox.clear()
    for number in range(64):
        outbox.add_part(frame_part([number], [number]))
    assert len(outbox.take_parts()) == 64


@pytest.mark.parametrize(("rows", "width"), [(3, 100_000), (9, 40_000), (70, 4000), (5000, 40)])
def test_a_stream_with_large_details_goes_out_in_parts_with_its_tokens(rows: int, width: int) -> None:
    part = frame_part([5], list(range(rows)), [rows], [detail(5, rows, width)], [finish(5)])
    found = divided(part)
    tokens: list[int] = []
    for one in found[:-1]:
        stream, counts, own = columns(one)
        ranks = [rank for encoded in one.details for rank in pb.Detail.FromString(encoded).logprobs.rank]
        assert ranks == own
        assert set(stream) == {5}
        assert sum(counts or []) == len(own)
        assert one.size_bytes() <= MAX_FRAME_BYTES + 8 * len(stream) + 4 * len(own) or len(own) == 1
        tokens += own
    assert tokens == list(range(rows))
    assert (found[-1].stream, found[-1].details, found[-1].finishes) == (None, [], part.finishes)


@pytest.mark.parametrize(
    ("spare", "expected"),
    [
        (100, [([1, 2, 3, 1], [1, 2, 1, 1], [10, 20, 21, 30, 11])]),
        (6, [([1, 2, 3], [1, 2, 1], [10, 20, 21, 30]), ([1], [1], [11])]),
    ],
)
def test_streams_beside_each_other_keep_their_entries_and_details(
    spare: int, expected: list[tuple[list[int], list[int], list[int]]]
) -> None:
    width = PIECE_BYTES // 8 - spare  # of a row that just fits a piece
    details = [detail(1, 1, width), detail(2, 2, 20), detail(1, 1, width, first=4), detail(9, 1)]
    found = divided(frame_part([1, 2, 3, 1], [10, 20, 21, 30, 11], [1, 2, 1, 1], details))
    assert [columns(one) for one in found[:-1]] == expected
    order = [pb.Detail.FromString(encoded).stream for one in found for encoded in one.details]
    assert order == [1, 2, 1, 9]


def test_entries_that_count_nothing_vanish_and_a_part_of_nothing_stays_one() -> None:
    assert [columns(one) for one in divided(frame_part([1, 2], [5], [0, 1]))] == [([2], [1], [5])]
    assert divided(frame_part()) == [FramePart(None, None, None, [], [])]


def test_rows_of_the_prompt_come_before_all_tokens() -> None:
    long = pb.Logprobs(width=1, token=[1] * 100_000, logprob=[1.0] * 100_000, rank=range(100_000))
    part = frame_part([5], [42], details=[pb.Detail(stream=5, prompt_logprobs=long, logprobs=detail(5, 1).logprobs)])
    *prompt, last = divided(part)
    ranks = [rank for one in prompt for rank in pb.Detail.FromString(one.details[0]).prompt_logprobs.rank]
    assert ranks == list(range(100_000))
    assert columns(last) == ([5], [1], [42])
    assert [pb.Detail.FromString(one).HasField("logprobs") for one in last.details] == [True]


def test_frames_of_an_outbox_stay_small_whatever_a_part_holds() -> None:
    outbox = FrameOutbox()
    outbox.add_part(frame_part([4], [1]))
    outbox.add_part(frame_part([5], list(range(70)), [70], [detail(5, 70, 4000)], [finish(5)]))
    outbox.add_part(frame_part([6], [2]))
    tokens: list[int] = []
    ranks: list[int] = []
    while outbox:
        raw = outbox.take()
        assert len(raw) < 1.1 * MAX_FRAME_BYTES
        frame = pb.Frame.FromString(raw)
        tokens += frame.token
        ranks += [rank for one in frame.detail for rank in one.logprobs.rank]
    assert (tokens, ranks) == ([1, *range(70), 2], list(range(70)))
