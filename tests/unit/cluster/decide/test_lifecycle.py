"""What an observation means for one replica: the event, its reason for people and its cause, case by case."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatoken.cluster.decide.exit_cause import ExitCause
from megatoken.cluster.decide.fleet import (
    Limits,
    Observation,
    Phase,
    Replica,
    ReplicaObservation,
    Reservation,
    WorkerFacts,
)
from megatoken.cluster.decide.lifecycle import event_for
from megatoken.cluster.decide.liveness import Hang, HangSeen, PartSeen
from megatoken.cluster.decide.replica import ReplicaEvent, ReplicaState
from megatoken.cluster.inventory.topology import Device, Inventory, Node
from megatoken.cluster.placement.place import Placement, Rank
from megatoken.cluster.spec.model import ModelSpec

NODES = Inventory(
    (
        Node("aaaa", "10.0.0.1", (Device("cpu", 0),), name="alpha"),
        Node("bbbb", "10.0.0.2", (Device("cpu", 0),), name="beta"),
    )
)
MODEL = ModelSpec(name="m", engine="simulated", start_timeout_s=100.0)
LIMITS = Limits(reserve_timeout_s=30.0, drain_overtime_s=2.0)
FACTS = WorkerFacts("10.0.0.1:7000", 1, "simulated")
PLACEMENT = Placement("m-1", "m", (Rank(0, "aaaa", 0, "cpu"), Rank(1, "bbbb", 0, "cpu")))
HELD = {"reservation": Reservation.GRANTED}
SERVES = {**HELD, "phase": Phase.SERVING, "facts": FACTS}
SINCE_S = 1000.0


def met(state: ReplicaState, after_s: float = 0.0, **seen: Any) -> tuple[ReplicaEvent, str, ExitCause] | None:
    """What `seen` means so long after the replica came into its state."""
    complete, inventory = seen.pop("complete", True), seen.pop("inventory", NODES)
    model, changes = seen.pop("model", MODEL), seen.pop("replica", {})
    replica = Replica("m-1", "m", "v1", 1, PLACEMENT, 0.0, state, since_s=SINCE_S, drain_cause="asked for")
    observation = Observation(inventory, {"m-1": ReplicaObservation(**seen)}, complete)
    return event_for(replace(replica, **changes), model, observation, LIMITS, SINCE_S + after_s)


def test_devices_come_or_are_given_up_after_their_time() -> None:
    assert met(ReplicaState.RESERVING, **HELD) == (ReplicaEvent.RESERVED, "", ExitCause.UNKNOWN)
    pending = {"reservation": Reservation.PENDING}
    assert met(ReplicaState.RESERVING, 30.0, **pending) is None
    assert met(ReplicaState.RESERVING, 30.1, **pending) == (
        ReplicaEvent.FAIL,
        "Ray did not grant its devices within 30 s",
        ExitCause.RESERVE_TIMEOUT,
    )


def test_a_start_serves_or_fails_after_the_model_s_own_time() -> None:
    assert met(ReplicaState.STARTING, **SERVES) == (ReplicaEvent.SERVING, "", ExitCause.UNKNOWN)
    assert met(ReplicaState.STARTING, **{**SERVES, "facts": None}) is None
    assert met(ReplicaState.STARTING, **{**SERVES, "phase": Phase.STARTING}) is None
    starting = {**HELD, "phase": Phase.STARTING}
    assert met(ReplicaState.STARTING, 100.0, **starting) is None
    late = (ReplicaEvent.FAIL, "it did not serve within start_timeout_s = 100 s", ExitCause.START_TIMEOUT)
    assert met(ReplicaState.STARTING, 100.1, **starting) == late
    assert met(ReplicaState.STARTING, 30.1, **starting) is None
    removed = met(ReplicaState.STARTING, 30.1, **starting, model=None)  # of a removed model: as devices
    assert removed is not None
    assert removed[2] is ExitCause.START_TIMEOUT


@pytest.mark.parametrize("state", [ReplicaState.STARTING, ReplicaState.READY, ReplicaState.DRAINING])
def test_whoever_loses_its_devices_fails_unless_nothing_was_seen_at_all(state: ReplicaState) -> None:
    seen = {**SERVES, "reservation": Reservation.NONE}
    if state is ReplicaState.STARTING:
        seen |= {"phase": Phase.STARTING, "facts": None}
    assert met(state, **seen) == (ReplicaEvent.FAIL, "Ray no longer holds its devices", ExitCause.DEVICES_LOST)
    assert met(state, **seen, complete=False) is None


@pytest.mark.parametrize("state", [ReplicaState.READY, ReplicaState.DRAINING])
def test_whoever_served_and_is_gone_fails_unless_nothing_was_seen_at_all(state: ReplicaState) -> None:
    assert met(state, **HELD) == (ReplicaEvent.FAIL, "its worker is gone", ExitCause.ACTOR_LOST)
    assert met(state, **HELD, complete=False) is None
    assert met(ReplicaState.STARTING, **HELD) is None


@pytest.mark.parametrize("state", [s for s in ReplicaState if s not in (ReplicaState.FAILED, ReplicaState.STOPPED)])
def test_an_exit_fails_with_its_own_reason_and_cause(state: ReplicaState) -> None:
    told = {**HELD, "phase": Phase.EXITED, "reason": "killed by SIGKILL", "cause": ExitCause.KILLED_FROM_OUTSIDE}
    assert met(state, **told) == (ReplicaEvent.FAIL, "killed by SIGKILL", ExitCause.KILLED_FROM_OUTSIDE)
    untold = met(state, **HELD, phase=Phase.EXITED)
    assert untold == (ReplicaEvent.FAIL, "its worker process ended", ExitCause.UNKNOWN)


@pytest.mark.parametrize(
    ("nodes", "name"),
    [
        (NODES.nodes[:1], "bbbb"),
        ((NODES.nodes[0], replace(NODES.nodes[1], alive=False)), "beta"),
        ((replace(NODES.nodes[0], alive=False), NODES.nodes[1]), "alpha"),
    ],
)
def test_a_lost_node_is_named_and_outweighs_all_else(nodes: tuple[Node, ...], name: str) -> None:
    for seen in (SERVES, {**HELD, "phase": Phase.EXITED, "reason": "status 1"}):
        found = met(ReplicaState.READY, **seen, inventory=Inventory(nodes))
        assert found == (ReplicaEvent.FAIL, f"node lost: {name}", ExitCause.NODE_LOST)
    assert met(ReplicaState.READY, **SERVES, inventory=Inventory(nodes), complete=False) is None


@pytest.mark.parametrize(
    ("hang", "cause", "text"),
    [
        (Hang.NO_ANSWER, ExitCause.NO_ANSWER, "its worker has not answered for 7 s"),
        (Hang.NO_STEP, ExitCause.HUNG, "its engine has requests and has made no step for 7 s"),
        (Hang.NO_TOKEN, ExitCause.HUNG, "its idle engine was asked for a token and has made no step for 7 s"),
    ],
)
@pytest.mark.parametrize("state", [ReplicaState.READY, ReplicaState.DRAINING])
def test_a_hang_fails_with_what_is_to_blame(state: ReplicaState, hang: Hang, cause: ExitCause, text: str) -> None:
    def reason(*parts: PartSeen) -> str:
        found = met(state, **SERVES, hang=HangSeen(hang, 7.2, parts))
        assert found is not None
        assert (found[0], found[2]) == (ReplicaEvent.FAIL, cause)
        return found[1]

    assert reason() == f"{text} (rank 0: alpha device 0, rank 1: beta device 0)"
    assert reason(PartSeen("bbbb")) == f"{text} (beta does not answer)"
    assert reason(PartSeen("gone")) == f"{text} (gone does not answer)"
    stopped = PartSeen("aaaa", "engine", 41, "stopped by a signal")
    assert reason(stopped) == f"{text} (its engine on alpha: process 41 is stopped by a signal)"
    rank = reason(PartSeen("aaaa", "worker", 40), PartSeen("bbbb", "rank 1", 42, "frozen"))
    assert rank == f"{text} (rank 1: beta device 0: process 42 is frozen)"


def test_a_drain_ends_with_its_last_request_or_past_its_deadline() -> None:
    drained = (ReplicaEvent.DRAINED, "drained (asked for)", ExitCause.DRAINED)
    assert met(ReplicaState.DRAINING, **SERVES, unfinished=0) == drained
    assert met(ReplicaState.DRAINING, **SERVES, unfinished=1) is None
    assert met(ReplicaState.DRAINING, 1e6, **SERVES, unfinished=1) is None  # without a deadline
    ends = {"replica": {"drain_deadline_s": SINCE_S + 10.0}}
    assert met(ReplicaState.DRAINING, 12.0, **SERVES, unfinished=3, **ends) is None
    for unfinished, left in ((3, "3"), (None, "some")):
        found = met(ReplicaState.DRAINING, 12.1, **SERVES, unfinished=unfinished, **ends)
        reason = f"drain deadline passed with {left} requests left (asked for)"
        assert found == (ReplicaEvent.DRAINED, reason, ExitCause.DRAINED)
    assert met(ReplicaState.DRAINING, **HELD, unfinished=0) == drained, "it said so before it was gone"
