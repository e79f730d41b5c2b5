"""The replica's table: every State x Event pair, legal and illegal."""

import itertools

import pytest

from megatoken.cluster.decide.replica import FINAL, LIFECYCLE, LIVE, ReplicaEvent, ReplicaState
from megatoken.transitions import IllegalTransition

S, E = ReplicaState, ReplicaEvent
LEGAL = {
    (S.RESERVING, E.RESERVED): S.STARTING,
    (S.RESERVING, E.STOP): S.STOPPED,
    (S.RESERVING, E.FAIL): S.FAILED,
    (S.STARTING, E.SERVING): S.READY,
    (S.STARTING, E.STOP): S.STOPPED,
    (S.STARTING, E.FAIL): S.FAILED,
    (S.READY, E.DRAIN): S.DRAINING,
    (S.READY, E.FAIL): S.FAILED,
    (S.DRAINING, E.DRAINED): S.STOPPED,
    (S.DRAINING, E.FAIL): S.FAILED,
}


@pytest.mark.parametrize(("state", "event"), list(itertools.product(S, E)))
def test_every_pair(state: ReplicaState, event: ReplicaEvent) -> None:
    if (state, event) in LEGAL:
        assert LIFECYCLE.next(state, event) is LEGAL[state, event]
    else:
        with pytest.raises(IllegalTransition, match=f"event {event} in state {state}"):
            LIFECYCLE.next(state, event)


def test_final_states_are_left_by_nothing_and_live_ones_may_fail() -> None:
    assert set(S) == LIVE | FINAL
    assert not LIVE & FINAL
    assert not [state for state, _ in LIFECYCLE.legal() if state in FINAL]
    assert all((state, E.FAIL) in LIFECYCLE.legal() for state in LIVE)
