"""The life of one request, as a table.

    QUEUED ── placed ──> RUNNING ── lost ──> RESUMING ── placed ──> RUNNING
       │                    │                   │
       └──────── ended ─────┴─────── ended ─────┘──> FINISHED

Moved by request.py alone.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from megatoken.transitions import Transitions


class RequestState(StrEnum):
    QUEUED = "queued"  # waits for a replica
    RUNNING = "running"  # a replica has it
    RESUMING = "resuming"  # its replica is lost; waits for another
    FINISHED = "finished"


class RequestEvent(StrEnum):
    PLACED = "placed"
    LOST = "lost"
    ENDED = "ended"  # finished, cancelled, refused, or failed


LIFECYCLE: Final = Transitions(
    {
        (RequestState.QUEUED, RequestEvent.PLACED): RequestState.RUNNING,
        (RequestState.QUEUED, RequestEvent.ENDED): RequestState.FINISHED,
        (RequestState.RUNNING, RequestEvent.LOST): RequestState.RESUMING,
        (RequestState.RUNNING, RequestEvent.ENDED): RequestState.FINISHED,
        (RequestState.RESUMING, RequestEvent.PLACED): RequestState.RUNNING,
        (RequestState.RESUMING, RequestEvent.ENDED): RequestState.FINISHED,
    }
)
