"""What one Generate call is sent: in which messages, with which tokens, details and ends."""

from __future__ import annotations

import pytest

from megatoken.tokens.frames import pack
from megatoken.tokens.outbox import MAX_FRAME_BYTES
from megatoken.tokens.pieces import PIECE_BYTES
from megatoken.tokens.responses import WaitingResponses
from megatoken.tokens.wire import varint
from megatoken.v1.frame_columns_pb2 import GenerateResponse
from megatoken.v1.tokens_pb2 import Detail, Finish, Logprobs

Sent = tuple[int, int, int, bool]  # choice, tokens, rows of details, whether it holds the end


def detail(rows: int, size: int = 0, stream: int = 7) -> bytes:
    """A Detail of so many rows; filled up to `size` bytes with a field that nobody knows."""
    encoded = Detail(stream=stream, logprobs=Logprobs(width=1, rank=[1] * rows)).SerializeToString()
    if not size:
        return encoded
    rest = size - len(encoded) - 1
    fill = next(fill for fill in range(rest - 5, rest) if fill + len(varint(fill)) == rest)
    return encoded + b"\x7a" + varint(fill) + bytes(fill)


def all_of(waiting: WaitingResponses) -> list[Sent]:
    sent = []
    while waiting:
        message = GenerateResponse.FromString(waiting.take())
        assert message.detail.stream == message.finish.stream == 0
        rows = len(message.detail.logprobs.rank)
        sent.append((message.choice, len(message.tokens) // 4, rows, message.HasField("finish")))
    return sent


def test_nothing_waits_at_first_nor_after_all_was_taken() -> None:
    waiting = WaitingResponses()
    assert not waiting
    waiting.add(0, pack([1]), [])
    assert waiting
    waiting.take()
    assert not waiting


def test_choices_come_in_the_order_of_what_was_first_added_each_in_one_message() -> None:
    waiting = WaitingResponses()
    waiting.add(2, pack([1, 2]), [])
    waiting.add(0, pack([3]), [detail(1)])
    waiting.add(2, pack([4]), [detail(2), detail(1)])
    waiting.finish(1, Finish(stream=9, reason=1))
    waiting.finish(2, Finish(stream=9, reason=1))
    assert all_of(waiting) == [(2, 3, 3, True), (0, 1, 1, False), (1, 0, 0, True)]


def test_tokens_and_details_of_a_choice_stay_in_order() -> None:
    waiting = WaitingResponses()
    for number in (5, 6, 7):
        own = Detail(stream=1, logprobs=Logprobs(width=1, token=[number], rank=[number]))
        waiting.add(3, pack([number]), [own.SerializeToString()])
    message = GenerateResponse.FromString(waiting.take())
    assert (message.tokens, list(message.detail.logprobs.rank)) == (pack([5, 6, 7]), [5, 6, 7])


@pytest.mark.parametrize(
    ("tokens", "messages"),
    [
        (MAX_FRAME_BYTES // 4, [MAX_FRAME_BYTES // 4]),
        (MAX_FRAME_BYTES // 4 + 1, [MAX_FRAME_BYTES // 4, 1]),
        (MAX_FRAME_BYTES // 2 + 3, [MAX_FRAME_BYTES // 4, MAX_FRAME_BYTES // 4, 3]),
    ],
)
def test_a_message_has_so_many_tokens_at_most_and_the_last_one_the_end(tokens: int, messages: list[int]) -> None:
    waiting = WaitingResponses()
    waiting.add(1, pack(range(tokens)), [])
    waiting.finish(1, Finish(reason=1))
    assert all_of(waiting) == [(1, each, 0, at == len(messages) - 1) for at, each in enumerate(messages)]


@pytest.mark.parametrize(
    ("sizes", "tokens", "messages"),
    [
        ([PIECE_BYTES, PIECE_BYTES], 6, [(6, 6)]),
        ([PIECE_BYTES, PIECE_BYTES - 1], 7, [(7, 6)]),
        ([PIECE_BYTES, PIECE_BYTES, 0], 9, [(6, 6), (3, 3)]),
        ([PIECE_BYTES, PIECE_BYTES - 40, 40, 40], 12, [(9, 9), (3, 3)]),
        ([PIECE_BYTES] * 5, 15, [(6, 6), (6, 6), (3, 3)]),
        ([PIECE_BYTES] * 3, 11, [(6, 6), (5, 3)]),  # tokens without details come with the last ones
    ],
)
def test_details_come_with_their_tokens_as_many_as_fit(
    sizes: list[int], tokens: int, messages: list[tuple[int, int]]
) -> None:
    waiting = WaitingResponses()
    waiting.add(0, pack(range(tokens)), [detail(3, size) for size in sizes])
    waiting.finish(0, Finish(reason=1))
    last = len(messages) - 1
    assert all_of(waiting) == [(0, *each, at == last) for at, each in enumerate(messages)]


def test_one_row_larger_than_a_message_goes_by_itself_with_its_token() -> None:
    width = MAX_FRAME_BYTES // 8 + 1000
    wide = Logprobs(width=width, token=[1] * width * 2, logprob=[-1.0] * width * 2, rank=[1, 2])
    waiting = WaitingResponses()
    waiting.add(0, pack([1, 2]), [Detail(logprobs=wide).SerializeToString()])
    waiting.finish(0, Finish(reason=1))
    assert all_of(waiting) == [(0, 1, 1, False), (0, 1, 1, True)]


def test_what_did_not_fit_comes_before_what_is_added_later() -> None:
    waiting = WaitingResponses()
    waiting.add(0, pack(range(MAX_FRAME_BYTES // 4 + 1)), [])
    waiting.take()
    waiting.add(0, pack([8]), [])
    assert GenerateResponse.FromString(waiting.take()).tokens == pack([MAX_FRAME_BYTES // 4, 8])
