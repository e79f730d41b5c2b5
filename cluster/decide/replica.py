"""The life of one replica as a table.

    RESERVING -> STARTING -> READY -> DRAINING -> STOPPED, and any live state -> FAILED

STOPPED and FAILED are final: a failed replica is replaced under a new id and never revived. lifecycle.py turns what is
observed into events; this module only says where each event leads. Both are pure; the controller dispatches.
"""

from __future__ import annotations

from enum import StrEnum

from megatoken.transitions import Transitions


class ReplicaState(StrEnum):
    RESERVING = "RESERVING"  # its placement group is asked for
    STARTING = "STARTING"  # it holds its devices and its worker loads
    READY = "READY"  # it serves
    DRAINING = "DRAINING"  # nothing new; running requests end
    STOPPED = "STOPPED"  # ended as asked
    FAILED = "FAILED"  # ended otherwise


class ReplicaEvent(StrEnum):
    RESERVED = "reserved"
    SERVING = "serving"
    DRAIN = "drain"
    DRAINED = "drained"  # no request left, or the deadline passed
    STOP = "stop"  # end it now; before READY there is nothing to drain
    FAIL = "fail"


LIVE = frozenset({ReplicaState.RESERVING, ReplicaState.STARTING, ReplicaState.READY, ReplicaState.DRAINING})
FINAL = frozenset({ReplicaState.STOPPED, ReplicaState.FAILED})

_S, _E = ReplicaState, ReplicaEvent
LIFECYCLE = Transitions(
    {
        (_S.RESERVING, _E.RESERVED): _S.STARTING,
        (_S.RESERVING, _E.STOP): _S.STOPPED,
        (_S.RESERVING, _E.FAIL): _S.FAILED,
        (_S.STARTING, _E.SERVING): _S.READY,
        (_S.STARTING, _E.STOP): _S.STOPPED,
        (_S.STARTING, _E.FAIL): _S.FAILED,
        (_S.READY, _E.DRAIN): _S.DRAINING,
        (_S.READY, _E.FAIL): _S.FAILED,
        (_S.DRAINING, _E.DRAINED): _S.STOPPED,
        (_S.DRAINING, _E.FAIL): _S.FAILED,
    }
)
