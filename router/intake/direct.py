"""Tokens that go to their request and not with its session's columns: it calls Generate, replays, or holds back.

Also the first tokens of an attempt, until its slot takes part in the columns. Called by tokens.
"""

from __future__ import annotations

from typing import Final

from megatoken.router.core.held import flush_held
from megatoken.router.core.recovery import lose
from megatoken.router.core.request import Request
from megatoken.router.core.state import RouterState
from megatoken.router.intake.first_token import first_token
from megatoken.tokens import continuation
from megatoken.v1 import tokens_pb2

EACH: Final = 0  # tokens.proto, Delivery
COALESCE: Final = 1


def take_direct(state: RouterState, request: Request, packed: bytes, details: list[bytes], now: float) -> None:
    """Tokens of a request that needs a look: Generate, the first of an attempt, a replay, held delivery."""
    first_token(state, request, now)
    if request.replayed:
        packed, details = _check_replay(state, request, packed, details, now)
        if not packed:
            return
    if request.delivery != EACH:
        _hold(state, request, details, now)
        return
    if request.sink_index >= 0 and not request.replayed:
        state.slots.sink[request.slot] = request.sink_index  # from now on with all others
    state.ledger.delivered_tokens += len(packed) // 4
    request.sink.push_tokens(request, packed, details)


def _check_replay(
    state: RouterState, request: Request, packed: bytes, details: list[bytes], now: float
) -> tuple[bytes, list[bytes]]:
    """Swallows what the client has had already; what comes back is new.

    Where the tokens differ, the replay is given up: the request goes on from the tokens that the client has.
    """
    had = request.replayed[request.replay_at : request.replay_at + len(packed)]
    if packed[: len(had)] != had:
        request.replay = False
        request.resume_note = "seeded sampling restarted: the tokens made again differed from those sent"
        lose(state, request, request.resume_note, now, known_to_worker=True)
        return b"", []
    request.replay_at += len(had)
    if request.replay_at < len(request.replayed):
        return b"", []
    request.replayed = b""
    kept, old = [], len(had) // 4  # rows that the client has, of one detail after the other
    for raw in details:
        detail = tokens_pb2.Detail.FromString(raw)
        rows = len(detail.logprobs.rank)
        continuation.drop_rows(detail, min(old, rows))
        old -= min(old, rows)
        if detail.logprobs.rank:
            kept.append(detail.SerializeToString())
    return packed[len(had) :], kept


def _hold(state: RouterState, request: Request, details: list[bytes], now: float) -> None:
    """Held delivery: the first token at once, the rest when due or at the end."""
    request.held_details += details
    if request.sent_tokens == 0:
        flush_held(state, request)
    elif request.delivery == COALESCE and not request.hold_due:
        request.hold_due = True
        state.holds.push(now + request.max_delay_s, request)
