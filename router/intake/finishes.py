"""A worker says that a stream ended: its request ends, or moves where the worker was at fault. Called by intake."""

from __future__ import annotations

from typing import Final

from megatoken.router.core.accounts import uncharge
from megatoken.router.core.ending import CANCELLED, ERROR, fail, settle
from megatoken.router.core.held import flush_held
from megatoken.router.core.recovery import lose
from megatoken.router.core.request import Request
from megatoken.router.core.state import RouterState
from megatoken.router.fleet.fleet import Endpoint
from megatoken.router.intake.first_token import first_token
from megatoken.v1 import tokens_pb2

_FULL: Final = 8  # gRPC RESOURCE_EXHAUSTED: the worker has no room, which is no fault
# What a worker says when it, and not the request, is at fault: gRPC UNKNOWN, INTERNAL, UNAVAILABLE.
_FAULTS: Final = frozenset((2, 13, 14))


def take_finish(state: RouterState, replica: Endpoint, finish: tokens_pb2.Finish, now: float) -> None:
    """Ends the request that the worker ended; one that cannot be ended so, ends with an error."""
    slot = finish.stream
    if slot >= state.slots.size or int(state.slots.replica[slot]) != replica.index:
        return  # it ended twice, or never was
    request: Request | None = state.slots.owner[slot]
    if request is None:  # an orphan: cancelled, or gone on elsewhere
        state.slots.free(slot)
        return
    try:
        _finish(state, replica, request, finish, now)
    except Exception as error:
        fail(state, request, "finish", error, now)
        if int(state.slots.replica[slot]) == replica.index and state.slots.owner[slot] is None:
            state.slots.free(slot)  # its worker has said that it ended, and will not say so again


def _finish(state: RouterState, replica: Endpoint, request: Request, finish: tokens_pb2.Finish, now: float) -> None:
    slot = request.slot
    state.ledger.add("cached_tokens", finish.cached_tokens)
    request.pool.measures.cached_tokens += finish.cached_tokens
    if finish.reason == ERROR and finish.code in _FAULTS:
        if finish.engine_dead:
            replica.circuit.trip(now)  # before any other end of it is read: nothing may be tried there
        else:
            replica.circuit.failed(now)
        why = finish.message or f"replica {replica.name} failed it"
        lose(state, request, why, now, known_to_worker=False, died=finish.engine_dead)
        return
    if finish.reason == CANCELLED or (finish.reason == ERROR and finish.code == _FULL):
        lose(state, request, finish.message or f"replica {replica.name} let go of it", now, known_to_worker=False)
        return
    if finish.reason != ERROR:
        first_token(state, request, now)
    if request.delivery:
        flush_held(state, request)
    finish.generated_tokens = max(int(state.slots.generated[slot]), len(request.replayed) // 4)
    finish.replica = finish.replica or replica.name
    uncharge(state, request, now)
    state.pages.free(slot)
    state.slots.free(slot)
    request.slot = -1
    settle(state, request, finish, now)
