"""What one tick makes of several models and of edges in time; test_reconciler.py has the stories of one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from megatoken.cluster.decide.exit_cause import ExitCause
from megatoken.cluster.decide.fleet import (
    Block,
    Desired,
    Fleet,
    Limits,
    ModelHealth,
    Observation,
    Phase,
    Plan,
    Release,
    Replica,
    ReplicaObservation,
    Reservation,
    TellDrain,
    WorkerFacts,
)
from megatoken.cluster.decide.reconciler import reconcile
from megatoken.cluster.decide.replica import ReplicaEvent, ReplicaState
from megatoken.cluster.inventory.topology import Device, Inventory, Node
from megatoken.cluster.placement.place import BlockedKind, Placement, Rank
from megatoken.cluster.spec.model import ModelSpec, UpdateSpec

NOW = 500.0
LIMITS = Limits(backoff_s=1.0, backoff_max_s=8.0, drain_grace_s=0.5, settled_s=30.0, ended_kept=2)
SERVING = ReplicaObservation(Reservation.GRANTED, Phase.SERVING, WorkerFacts("127.0.0.1:1", 1, "simulated"))
EXITED = ReplicaObservation(Reservation.GRANTED, Phase.EXITED, reason="exit status 1", cause=ExitCause.PROGRAM_ENDED)


def model(name: str, replicas: int = 1, **changes: Any) -> ModelSpec:
    return ModelSpec(name=name, engine="simulated", replicas=replicas, **changes)


def replica(
    spec: ModelSpec, serial: int, device: int, state: ReplicaState = ReplicaState.READY, **fields: Any
) -> Replica:
    name = f"{spec.name}-{serial}"
    place = Placement(name, spec.name, (Rank(0, "n0", device, "cpu"),))
    made = Replica(name, spec.name, spec.revision, 1, place, 0.0, state, since_s=NOW - 100.0)
    return replace(made, **fields)


def fleet_of(*replicas: Replica, health: Mapping[str, ModelHealth] | None = None) -> Fleet:
    return Fleet(replicas, health or {}, serial=9)


def plan(
    desired: Desired,
    fleet: Fleet,
    seen: dict[str, ReplicaObservation],
    devices: int = 8,
    *,
    complete: bool = True,
) -> Plan:
    node = Node("n0", "10.0.0.1", tuple(Device("cpu", index) for index in range(devices)))
    return reconcile(desired, fleet, Observation(Inventory((node,)), seen, complete), LIMITS, NOW)


def told(found: Plan) -> list[str]:
    return [f"{event.subject}: {event.message} [{event.cause}]" for event in found.events]


def test_a_start_says_how_long_each_phase_took_beginning_with_its_place() -> None:
    spec = model("a")
    starting = replica(spec, 1, 0, ReplicaState.STARTING, created_s=NOW - 20.0, since_s=NOW - 17.5)
    phases = (("start", 0.5), ("import", 7.25), ("weights", 1.0))
    seen = replace(SERVING, facts=WorkerFacts("127.0.0.1:1", 1, "vllm", start_s=phases))
    found = plan(Desired(1, (spec,)), fleet_of(starting), {"a-1": seen})
    (ready,) = found.fleet.replicas
    assert ready.facts is not None
    assert ready.facts.start_s == (("place", 2.5), *phases)
    said = "after 11.2 s (place 2.5, start 0.5, import 7.2, weights 1.0)"
    assert told(found) == [f"a-1: STARTING -> READY: {said} [observed]"]
    assert ready.reason == ""


def test_replicas_of_every_model_that_has_too_many_go() -> None:
    one, two = model("a"), model("b")
    fleet = fleet_of(*(replica(spec, serial, serial) for spec, serial in ((one, 1), (one, 2), (two, 3), (two, 4))))
    found = plan(Desired(1, (one, two)), fleet, dict.fromkeys(["a-1", "a-2", "b-3", "b-4"], SERVING))
    assert told(found) == [
        "a-2: READY -> DRAINING: 1 wanted [1 wanted]",
        "b-4: READY -> DRAINING: 1 wanted [1 wanted]",
    ]


@pytest.mark.parametrize(("stopping", "cause"), [(False, "its model was removed"), (True, "the cluster goes down")])
def test_a_removed_model_and_a_cluster_that_goes_down_are_told_apart(stopping: bool, cause: str) -> None:
    gone = model("a")
    found = plan(Desired(1, (), stopping=stopping), fleet_of(replica(gone, 1, 0)), {"a-1": SERVING})
    assert told(found) == [f"a-1: READY -> DRAINING: {cause} [{cause}]"]
    drained = found.fleet.replicas[0]
    assert drained.drain_deadline_s == NOW + 30.0, "of a model that is not known any more"
    assert (drained.history, drained.since_s) == ((ReplicaEvent.DRAIN,), NOW)


def test_what_an_update_takes_away_is_told_as_replaced() -> None:
    wanted = model("a", update=UpdateSpec(surge=1), drain_timeout_s=7.0)
    old = replica(wanted, 1, 0, revision="older")
    found = plan(Desired(2, (wanted,)), Fleet((old, replica(wanted, 2, 1))), {"a-1": SERVING, "a-2": SERVING})
    assert told(found) == ["a-1: READY -> DRAINING: replaced by an update [replaced by an update]"]
    assert found.fleet.replicas[0].drain_deadline_s == NOW + 7.0
    assert found.fleet.rollouts == {"a": "1 of 1 updated"}


def test_of_two_updates_without_room_one_old_replica_goes_at_a_time() -> None:
    one, two = model("a"), model("b")
    fleet = fleet_of(replica(one, 1, 0, revision="older"), replica(two, 2, 1, revision="older"))
    found = plan(Desired(2, (one, two)), fleet, {"a-1": SERVING, "b-2": SERVING}, devices=2)
    states = {one.id: one.state for one in found.fleet.replicas}
    assert states == {"a-1": ReplicaState.DRAINING, "b-2": ReplicaState.READY}
    assert {name: block.kind for name, block in found.fleet.blocked.items()} == {
        "a": BlockedKind.CAPACITY,
        "b": BlockedKind.CAPACITY,
    }


def test_no_old_replica_goes_where_that_would_not_make_room() -> None:
    wide = model("a", parallel={"tensor": 2})
    fleet = fleet_of(replica(wide, 1, 0, revision="older"))
    found = plan(Desired(2, (wide,)), fleet, {"a-1": SERVING}, devices=1)
    assert found.fleet.replicas[0].state is ReplicaState.READY
    enough = plan(Desired(2, (wide,)), fleet, {"a-1": SERVING}, devices=2)
    assert enough.fleet.replicas[0].state is ReplicaState.DRAINING


@pytest.mark.parametrize(
    ("since_s", "known", "failures"),
    [
        (NOW - 30.0, "own", 0),  # served for long enough: a clean record
        (NOW - 29.9, "own", 3),
        (NOW - 30.0, "older", 3),  # what serves is not what failed
    ],
)
def test_a_replica_that_serves_for_long_clears_the_record_of_its_revision(
    since_s: float, known: str, failures: int
) -> None:
    wanted = model("a")
    health = {"a": ModelHealth(3, 0.0, wanted.revision if known == "own" else known, "boom")}
    fleet = fleet_of(replica(wanted, 1, 0, since_s=since_s), health=health)
    found = plan(Desired(1, (wanted,)), fleet, {"a-1": SERVING})
    assert found.fleet.health.get("a", ModelHealth()).failures == failures


@pytest.mark.parametrize(("known", "failures", "pause_s"), [("own", 3, 4.0), ("older", 1, 1.0)])
def test_failures_of_one_revision_are_not_counted_for_the_next(known: str, failures: int, pause_s: float) -> None:
    wanted = model("a")
    health = {"a": ModelHealth(2, 0.0, wanted.revision if known == "own" else known, "boom")}
    starting = replica(wanted, 1, 0, ReplicaState.STARTING)
    found = plan(Desired(1, (wanted,)), fleet_of(starting, health=health), {"a-1": EXITED})
    expected = ModelHealth(failures, NOW + pause_s, wanted.revision, "exit status 1", served=False)
    assert found.fleet.health["a"] == expected


@pytest.mark.parametrize(
    ("state", "since_s", "cause", "counted"),
    [
        (ReplicaState.READY, NOW - 29.9, ExitCause.PROGRAM_ENDED, True),
        (ReplicaState.READY, NOW - 30.0, ExitCause.PROGRAM_ENDED, False),
        (ReplicaState.STARTING, NOW - 40.0, ExitCause.PROGRAM_ENDED, True),
        (ReplicaState.DRAINING, NOW - 1.0, ExitCause.PROGRAM_ENDED, False),
        (ReplicaState.READY, NOW - 1.0, ExitCause.NODE_LOST, False),
    ],
)
def test_what_counts_against_a_model(state: ReplicaState, since_s: float, cause: ExitCause, counted: bool) -> None:
    wanted = model("a")
    fleet = fleet_of(replica(wanted, 1, 0, state, since_s=since_s))
    found = plan(Desired(1, (wanted,)), fleet, {"a-1": replace(EXITED, cause=cause)})
    assert ("a" in found.fleet.health) == counted
    if counted:
        assert found.fleet.health["a"].served == (state is ReplicaState.READY)


def test_a_worker_is_told_to_drain_once_routers_have_heard_of_it() -> None:
    wanted = model("a")
    for waited_s, asked in ((0.4, False), (0.5, True)):
        draining = replica(wanted, 1, 0, ReplicaState.DRAINING, since_s=NOW - waited_s)
        found = plan(Desired(1, (wanted,)), fleet_of(draining), {"a-1": SERVING})
        assert (TellDrain(draining) in found.actions) == asked


def test_while_ray_cannot_be_asked_what_blocked_a_model_stays_said() -> None:
    wanted, blocks = model("a"), {"a": Block(BlockedKind.CAPACITY, "no room"), "gone": Block(BlockedKind.STARTS, "x")}
    found = plan(Desired(1, (wanted,)), Fleet(blocked=blocks), {}, complete=False)
    assert found.fleet.blocked == {"a": blocks["a"]}
    assert found.actions == found.events == ()


def test_a_lease_that_still_runs_is_named_and_those_of_other_models_are_not() -> None:
    one, two = model("a"), model("b")
    lost = replica(one, 1, 0, ReplicaState.FAILED, reason="node lost: x", serves_until_s=NOW + 5.0)
    over = replica(one, 2, 1, ReplicaState.FAILED, reason="node lost: y", serves_until_s=NOW)
    other = replica(two, 3, 2, ReplicaState.FAILED, reason="node lost: z", serves_until_s=NOW + 5.0)
    found = plan(Desired(1, (one, two)), fleet_of(lost, over, other), {})
    text = "a-1 (node lost: x) may serve until its lease ends; its replacement starts then"
    assert found.fleet.blocked["a"] == Block(BlockedKind.LEASE, text, passes=True)


@pytest.mark.parametrize(
    ("state", "devices", "passes"),
    [
        (ReplicaState.DRAINING, 1, True),
        (ReplicaState.FAILED, 1, True),  # Ray has not let go of it
        (ReplicaState.READY, 1, False),
        (ReplicaState.DRAINING, 0, False),  # its devices are gone
    ],
)
def test_room_that_others_are_about_to_leave_blocks_a_model_only_for_a_while(
    state: ReplicaState, devices: int, passes: bool
) -> None:
    other, wanted = model("a", replicas=1 if state is ReplicaState.READY else 0), model("b")
    held = replica(other, 1, 0, state, since_s=NOW)
    found = plan(Desired(1, (other, wanted)), fleet_of(held), {held.id: SERVING}, devices)
    assert found.fleet.blocked["b"].passes is passes


@pytest.mark.parametrize(("failures", "passes"), [(1, True), (2, True), (3, False)])
def test_starts_that_fail_again_and_again_are_no_passing_fault(failures: int, passes: bool) -> None:
    wanted = model("a")
    health = {"a": ModelHealth(failures, NOW + 60.0, wanted.revision, "exit status 1")}
    found = plan(Desired(1, (wanted,)), Fleet(health=health), {})
    assert found.fleet.blocked["a"].passes is passes


def test_only_the_oldest_endings_are_forgotten_and_none_that_hold_something() -> None:
    wanted = model("a", replicas=0)
    ended = [replica(wanted, serial, 0, ReplicaState.STOPPED, since_s=NOW - serial) for serial in (1, 2, 3, 4)]
    found = plan(Desired(1, (wanted,)), fleet_of(*ended), {"a-4": SERVING})
    assert [one.id for one in found.fleet.replicas] == ["a-1", "a-2", "a-4"]
    assert found.actions == (Release("a-4"),)


def test_a_lost_replica_that_never_served_has_no_lease_to_wait_for() -> None:
    wanted = model("a")
    away = {"a-1": ReplicaObservation(lease_until_s=NOW + 9.0)}
    for facts, until_s in ((None, 0.0), (SERVING.facts, NOW + 9.0)):
        one = replica(wanted, 1, 0, facts=facts)
        lost = reconcile(Desired(1, (wanted,)), fleet_of(one), Observation(Inventory(), away), LIMITS, NOW)
        assert (lost.fleet.replicas[0].exit_cause, lost.fleet.replicas[0].serves_until_s) == (
            ExitCause.NODE_LOST,
            until_s,
        )
