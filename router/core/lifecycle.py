"""The life of one request, as a table.

    QUEUED ── placed ──> RUNNING ── lost ──> RESUMING ── placed ──> RUNNING
       │                    │                   │
       └──────── ended ─────┴─────── ended ─────┘──> FINISHED

Called by request.py alone. A move that the table does not have is a bug, and raises IllegalMove.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final


class State(StrEnum):
    QUEUED = "queued"  # waits for a replica
    RUNNING = "running"  # a replica has it
    RESUMING = "resuming"  # its replica is lost; waits for another
    FINISHED = "finished"


class Event(StrEnum):
    PLACED = "placed"
    LOST = "lost"
    ENDED = "ended"  # finished, cancelled, refused, or failed


TRANSITIONS: Final[dict[tuple[State, Event], State]] = {
    (State.QUEUED, Event.PLACED): State.RUNNING,
    (State.QUEUED, Event.ENDED): State.FINISHED,
    (State.RUNNING, Event.LOST): State.RESUMING,
    (State.RUNNING, Event.ENDED): State.FINISHED,
    (State.RESUMING, Event.PLACED): State.RUNNING,
    (State.RESUMING, Event.ENDED): State.FINISHED,
}


class IllegalTransition(RuntimeError):
    """A broken invariant of the router, never a caller's fault."""


def step(state: State, event: Event) -> State:
    """The next state. Raises IllegalTransition for a move that the table does not have."""
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        raise IllegalTransition(f"{event} in state {state}") from None
