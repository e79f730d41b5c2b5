"""Why a replica ended, as data. Whoever sees the end names its cause once; what is concluded from it never reads a
sentence. The sentence beside it (`reason`) is for people.
"""

from __future__ import annotations

from enum import StrEnum


class ExitCause(StrEnum):
    UNKNOWN = "unknown"  # it has not ended, or an older state file does not say
    PROGRAM_ENDED = "program_ended"  # by itself: an exit status, or a signal that a fault in it raises
    KILLED_FROM_OUTSIDE = "killed_from_outside"  # SIGKILL or SIGTERM that the controller did not send
    START_FAILED = "start_failed"  # there was never a process
    START_TIMEOUT = "start_timeout"
    RESERVE_TIMEOUT = "reserve_timeout"
    NODE_LOST = "node_lost"
    ACTOR_LOST = "actor_lost"  # what supervises it died, or Ray no longer knows it
    DEVICES_LOST = "devices_lost"  # Ray no longer holds its devices
    HUNG = "hung"  # its engine makes no step
    NO_ANSWER = "no_answer"  # its worker does not answer, though Ray calls it alive
    DRAINED = "drained"
    STOPPED = "stopped"  # as asked


BY_ITSELF = frozenset(
    {
        ExitCause.PROGRAM_ENDED,
        ExitCause.START_TIMEOUT,
        ExitCause.START_FAILED,
        ExitCause.RESERVE_TIMEOUT,
        ExitCause.HUNG,
    }
)
"""The replica's own doing, or its device's or its spec's; whatever else ends one comes from outside it."""
