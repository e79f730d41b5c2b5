"""Held delivery: what is passed on, in which pieces, and where it is taken from."""

from __future__ import annotations

import numpy as np
import pytest

from megatoken.router.core.held import MOST_TOKENS, flush_held
from megatoken.router.core.request import Request
from megatoken.tokens.frames import U32
from tests.support.router_core import CoreFleet


class Listener:
    """The pieces that a request was given."""

    def __init__(self) -> None:
        self.pieces: list[tuple[list[int], list[bytes]]] = []

    def push_tokens(self, _request: Request, packed: bytes, details: list[bytes]) -> None:
        self.pieces.append((np.frombuffer(packed, U32).tolist(), details))

    def push_finish(self, _request: Request, _finish: bytes) -> None:
        raise NotImplementedError


def held(tokens: int) -> tuple[CoreFleet, Request, Listener]:
    """A request whose replica made that many tokens, none of which was passed on."""
    fleet = CoreFleet(replicas=1, max_running=4)
    request = fleet.submit()
    request.delivery = 2
    request.sink = listener = Listener()
    state = fleet.state
    state.pages.append_run(request.slot, 0, np.arange(tokens, dtype=U32))
    state.slots.generated[request.slot] = tokens
    return fleet, request, listener


def test_all_tokens_that_the_client_has_not_had_go_in_one_piece_with_their_details() -> None:
    fleet, request, listener = held(5)
    request.sent_tokens, request.held_details = 2, [b"row"]
    for _ in range(2):
        flush_held(fleet.state, request)
        assert listener.pieces == [([2, 3, 4], [b"row"])]
        assert (request.sent_tokens, request.held_details, fleet.state.ledger.delivered_tokens) == (5, [], 3)


@pytest.mark.parametrize("sent", [3, 4])
def test_details_wait_where_no_token_is_new(sent: int) -> None:
    fleet, request, listener = held(3)
    request.sent_tokens, request.held_details = sent, [b"row"]
    flush_held(fleet.state, request)
    assert (listener.pieces, request.held_details, fleet.state.ledger.delivered_tokens) == ([], [b"row"], 0)


def test_a_piece_holds_131072_tokens_at_most_and_the_details_go_with_the_last() -> None:
    assert MOST_TOKENS == 131_072
    fleet, request, listener = held(2 * MOST_TOKENS + 3)
    request.held_details = [b"row"]
    flush_held(fleet.state, request)
    assert [(len(tokens), tokens[0], tokens[-1], details) for tokens, details in listener.pieces] == [
        (131_072, 0, 131_071, []),
        (131_072, 131_072, 262_143, []),
        (3, 262_144, 262_146, [b"row"]),
    ]
    assert fleet.state.ledger.delivered_tokens == 262_147


@pytest.mark.parametrize("field", ["carried", "replayed"])
def test_between_replicas_and_in_a_replay_what_is_kept_of_the_stream_is_passed_on(field: str) -> None:
    fleet, request, listener = held(2)
    setattr(request, field, np.arange(20, 24, dtype=U32).tobytes())
    request.sent_tokens = 1
    flush_held(fleet.state, request)
    assert (listener.pieces, request.sent_tokens) == ([([21, 22, 23], [])], 4)


def test_what_is_carried_goes_in_the_same_pieces() -> None:
    fleet, request, listener = held(0)
    request.carried = np.arange(MOST_TOKENS + 2, dtype=U32).tobytes()
    flush_held(fleet.state, request)
    assert [(len(tokens), tokens[0]) for tokens, _ in listener.pieces] == [(131_072, 0), (2, 131_072)]


def test_a_request_in_no_slot_has_nothing_to_pass_on() -> None:
    fleet, request, listener = held(2)
    request.slot = -1
    fleet.state.slots.generated[-1] = 5  # of another stream
    flush_held(fleet.state, request)
    assert listener.pieces == []
