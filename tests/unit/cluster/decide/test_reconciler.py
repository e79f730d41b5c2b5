"""The reconciler as a function: situations in, plans out."""

from dataclasses import replace
from typing import Any

import pytest

from megatoken.cluster.decide.cordon import Cordon
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
    ReplicaObservation,
    Reservation,
    Reserve,
    RollBack,
    Start,
    TellDrain,
    WorkerFacts,
)
from megatoken.cluster.decide.liveness import Hang, HangSeen, PartSeen
from megatoken.cluster.decide.reconciler import reconcile
from megatoken.cluster.decide.replica import ReplicaState
from megatoken.cluster.inventory.topology import Device, Inventory, Node
from megatoken.cluster.placement.place import BlockedKind
from megatoken.cluster.spec.model import ModelSpec

FACTS = WorkerFacts("127.0.0.1:1", 1, "simulated")
LIMITS = Limits(backoff_s=1.0, backoff_max_s=8.0)
SERVING = ReplicaObservation(Reservation.GRANTED, Phase.SERVING, FACTS)
STARTING = ReplicaObservation(Reservation.GRANTED, Phase.STARTING)


def model(replicas: int = 1, **changes: Any) -> ModelSpec:
    return ModelSpec(name="m", engine="simulated", replicas=replicas, **changes)


def nodes(*slots: int) -> Inventory:
    return Inventory(
        tuple(
            Node(f"n{number}", f"10.0.0.{number}", tuple(Device("cpu", index) for index in range(count)))
            for number, count in enumerate(slots)
        )
    )


class World:
    """Drives the reconciler by hand: what is seen of each replica is set by the test."""

    def __init__(self, wanted: ModelSpec, inventory: Inventory) -> None:
        self.desired = Desired(1, (wanted,))
        self.inventory = inventory
        self.fleet = Fleet()
        self.seen: dict[str, ReplicaObservation] = {}
        self.now = 100.0
        self.plan = Plan(Fleet())

    def tick(self, seconds: float = 1.0, *, complete: bool = True) -> Plan:
        self.now += seconds
        observation = Observation(self.inventory, dict(self.seen), complete)
        self.plan = reconcile(self.desired, self.fleet, observation, LIMITS, self.now)
        self.fleet = self.plan.fleet
        return self.plan

    def until_ready(self) -> None:
        """Grants and serves whatever is asked for until nothing is on its way."""
        for _ in range(10):
            self.tick()
            for action in self.plan.actions:
                if isinstance(action, Reserve):
                    self.seen[action.replica.id] = ReplicaObservation(Reservation.GRANTED)
                elif isinstance(action, Start):
                    self.seen[action.replica.id] = SERVING
                elif isinstance(action, Release):
                    self.seen.pop(action.replica_id, None)
            if not self.plan.actions:
                return

    def states(self) -> dict[str, str]:
        return {replica.id: replica.state.value for replica in self.fleet.replicas}

    def want(self, wanted: ModelSpec, **changes: Any) -> None:
        self.desired = replace(self.desired, models=(wanted,), generation=self.desired.generation + 1, **changes)

    def actions(self, kind: type) -> list[Any]:
        return [action for action in self.plan.actions if isinstance(action, kind)]


def test_the_way_from_nothing_to_ready_is_a_step_a_tick() -> None:
    world = World(model(), nodes(1))
    world.tick()
    assert world.states() == {"m-1": "RESERVING"}
    assert [action.replica.id for action in world.actions(Reserve)] == ["m-1"]
    world.seen["m-1"] = ReplicaObservation(Reservation.PENDING)
    assert world.tick().actions == ()
    world.seen["m-1"] = ReplicaObservation(Reservation.GRANTED)
    world.tick()
    assert world.states() == {"m-1": "STARTING"}
    assert [action.replica.id for action in world.actions(Start)] == ["m-1"]
    world.seen["m-1"] = STARTING
    assert world.tick().actions == ()
    world.seen["m-1"] = SERVING
    world.tick()
    assert world.states() == {"m-1": "READY"}
    assert world.fleet.replicas[0].facts == FACTS
    assert world.tick().actions == ()


def test_a_failed_replica_is_replaced_under_a_new_id_and_gives_its_devices_back_first() -> None:
    world = World(model(), nodes(1))
    world.until_ready()
    world.tick(60)
    world.seen["m-1"] = ReplicaObservation(Reservation.GRANTED, Phase.EXITED, FACTS, "killed by SIGKILL")
    world.tick()
    assert world.states() == {"m-1": "FAILED"}
    assert world.fleet.replicas[0].reason == "killed by SIGKILL"
    assert world.actions(Release) == [Release("m-1")]
    assert "m" in world.fleet.blocked  # its device is not free yet
    del world.seen["m-1"]
    world.tick()
    assert world.states() == {"m-1": "FAILED", "m-2": "RESERVING"}
    assert not world.fleet.blocked


def test_failed_starts_back_off_and_the_pause_doubles_up_to_its_bound() -> None:
    world = World(model(), nodes(1))
    pauses = []
    for _ in range(6):
        while not world.actions(Start):
            world.tick(0.25)
            for action in world.actions(Reserve):
                world.seen[action.replica.id] = ReplicaObservation(Reservation.GRANTED)
        replica = world.actions(Start)[0].replica.id
        world.seen[replica] = ReplicaObservation(Reservation.GRANTED, Phase.EXITED, None, "exit status 1")
        world.tick(0.25)
        assert "start" in world.fleet.blocked["m"].text
        pauses.append(world.fleet.health["m"].not_before_s - world.now)
        world.seen.clear()
        world.plan = Plan(world.fleet)
    assert pauses == [1.0, 2.0, 4.0, 8.0, 8.0, 8.0]


def test_a_lost_node_costs_no_backoff_and_names_itself() -> None:
    world = World(model(), nodes(1, 1))
    world.until_ready()
    lost = world.fleet.replicas[0].placement.driver_node
    world.inventory = Inventory(tuple(replace(n, alive=n.id != lost) for n in world.inventory.nodes))
    world.tick()
    assert world.fleet.replica("m-1").reason == f"node lost: {lost}"  # type: ignore[union-attr]
    assert "m" not in world.fleet.health
    assert world.states()["m-2"] == "RESERVING"


def test_nothing_is_concluded_from_a_look_that_failed() -> None:
    world = World(model(2), nodes(2))
    world.until_ready()
    before = world.states()
    world.seen.clear()
    world.inventory = Inventory()
    world.tick(complete=False)
    assert world.states() == before


def test_nothing_is_asked_for_again_after_a_look_that_failed() -> None:
    world = World(model(2), nodes(2))
    world.tick()
    world.seen = {"m-1": ReplicaObservation(Reservation.GRANTED), "m-2": ReplicaObservation(Reservation.PENDING)}
    world.tick()
    assert world.states() == {"m-1": "STARTING", "m-2": "RESERVING"}
    world.seen.clear()
    assert world.tick(complete=False).actions == (), "both may well be there: they were only not seen"


def test_a_fleet_that_was_forgotten_ends_before_another_is_made_under_other_ids() -> None:
    world = World(model(1), nodes(1))
    world.seen = {"m-7": SERVING}
    plan = world.tick()
    assert plan.actions == (Release("m-7"),)
    assert world.states() == {}, "which device it holds is not known"
    assert "m-7" in plan.fleet.blocked["m"].text
    world.seen.clear()
    world.tick()
    assert world.states() == {"m-8": "RESERVING"}, "no id is used twice"


def test_shrinking_drains_a_ready_replica_and_stops_one_that_never_served() -> None:
    world = World(model(3), nodes(3))
    world.until_ready()
    world.want(model(4))
    world.inventory = nodes(4)
    world.tick()
    assert world.states()["m-4"] == "RESERVING"
    world.want(model(2))
    world.tick()
    assert world.states() == {"m-1": "READY", "m-2": "READY", "m-3": "DRAINING", "m-4": "STOPPED"}


def test_a_drain_tells_the_worker_after_the_grace_and_ends_when_nothing_is_left() -> None:
    world = World(model(2), nodes(2))
    world.until_ready()
    world.want(model(1))
    world.tick()
    assert world.states()["m-2"] == "DRAINING"
    assert not world.actions(TellDrain)  # routers hear of it first
    world.tick(0.6)
    assert [action.replica.id for action in world.actions(TellDrain)] == ["m-2"]
    world.seen["m-2"] = replace(SERVING, unfinished=3)
    world.tick()
    assert world.states()["m-2"] == "DRAINING"
    world.seen["m-2"] = replace(SERVING, unfinished=0)
    world.tick()
    assert world.states()["m-2"] == "STOPPED"
    assert world.actions(Release) == [Release("m-2")]


def test_a_drain_ends_at_its_deadline_and_says_what_was_left() -> None:
    world = World(model(2, drain_timeout_s=10), nodes(2))
    world.until_ready()
    world.want(model(1, drain_timeout_s=10))
    world.tick()
    world.seen["m-2"] = replace(SERVING, unfinished=3)
    world.tick(11)
    assert world.states()["m-2"] == "DRAINING"  # routers move what is left now
    world.tick(2)
    assert world.states()["m-2"] == "STOPPED"
    assert "3 requests left" in world.fleet.replica("m-2").reason  # type: ignore[union-attr]


def test_what_has_no_room_is_blocked_and_starts_when_capacity_appears() -> None:
    world = World(model(2), nodes(1))
    world.until_ready()
    assert world.states() == {"m-1": "READY"}
    assert "device" in world.fleet.blocked["m"].text
    serial = world.fleet.serial
    world.tick()
    assert world.fleet.serial == serial  # waiting uses no ids up
    world.inventory = nodes(1, 1)
    world.until_ready()
    assert world.states() == {"m-1": "READY", "m-2": "READY"}
    assert not world.fleet.blocked


def test_an_update_surges_by_one_and_never_serves_with_fewer() -> None:
    old, new = model(2), model(2, dtype="float32")
    world = World(old, nodes(3))
    world.until_ready()
    world.want(new, previous={"m": old})
    for _ in range(40):
        world.tick()
        for action in world.plan.actions:
            if isinstance(action, Reserve):
                world.seen[action.replica.id] = ReplicaObservation(Reservation.GRANTED)
            elif isinstance(action, Start):
                world.seen[action.replica.id] = SERVING
            elif isinstance(action, TellDrain):
                world.seen[action.replica.id] = replace(SERVING, unfinished=0)
            elif isinstance(action, Release):
                world.seen.pop(action.replica_id, None)
        states = list(world.states().values())
        assert states.count("READY") >= 2
        assert sum(state in ("RESERVING", "STARTING", "READY") for state in states) <= 3
    live = [replica for replica in world.fleet.replicas if replica.live]
    assert [replica.revision for replica in live] == [new.revision] * 2
    assert not world.fleet.rollouts


def test_an_update_without_room_lets_one_old_replica_go_first() -> None:
    old, new = model(2), model(2, dtype="float32")
    world = World(old, nodes(2))
    world.until_ready()
    world.want(new, previous={"m": old})
    world.tick()
    assert sorted(world.states().values()) == ["DRAINING", "READY"]
    world.tick()
    assert sorted(world.states().values()) == ["DRAINING", "READY"]  # one at a time


def test_an_update_that_can_never_fit_takes_nothing_away() -> None:
    old, new = model(2), model(2, parallel={"tensor": 4})
    world = World(old, nodes(2))
    world.until_ready()
    world.want(new, previous={"m": old})
    for _ in range(5):
        world.tick()
    assert world.states() == {"m-1": "READY", "m-2": "READY"}
    assert "4 devices" in world.fleet.blocked["m"].text


def test_an_update_whose_starts_fail_is_rolled_back() -> None:
    old, new = model(1), model(1, dtype="float32")
    world = World(old, nodes(2))
    world.until_ready()
    world.want(new, previous={"m": old})
    world.fleet = replace(world.fleet, health={"m": ModelHealth(2, 0.0, new.revision, "exit status 1")})
    world.tick()
    assert world.actions(RollBack) == [RollBack("m", "2 starts failed in a row: exit status 1")]
    assert world.states() == {"m-1": "READY"}


def test_drain_requests_and_drained_nodes_take_replicas_away() -> None:
    world = World(model(2), nodes(1, 1, 1))
    world.until_ready()
    world.desired = replace(world.desired, drain_requests={"m-1": 5.0})
    world.tick()
    assert world.states() == {"m-1": "DRAINING", "m-2": "READY", "m-3": "RESERVING"}
    assert world.fleet.replica("m-1").drain_deadline_s == world.now + 5.0  # type: ignore[union-attr]
    node = world.fleet.replica("m-2").placement.driver_node  # type: ignore[union-attr]
    world.desired = replace(world.desired, drained_nodes=frozenset({node}))
    world.tick()
    assert world.states()["m-2"] == "DRAINING"


def test_a_cordoned_device_takes_away_the_replicas_on_it_alone() -> None:
    world = World(model(2), nodes(2, 2))
    world.until_ready()
    rank = world.fleet.replica("m-2").placement.ranks[0]  # type: ignore[union-attr]
    world.desired = replace(world.desired, cordons={(rank.node, rank.device): Cordon("hot")})
    world.tick()
    assert {name: state for name, state in world.states().items() if name != "m-3"} == {
        "m-1": "READY",
        "m-2": "DRAINING",
    }
    assert world.fleet.replica("m-2").drain_cause == "a device of it is cordoned"  # type: ignore[union-attr]


def test_a_removed_model_drains_and_a_stopping_cluster_starts_nothing() -> None:
    world = World(model(1), nodes(2))
    world.until_ready()
    world.desired = replace(world.desired, models=())
    world.tick()
    assert world.states() == {"m-1": "DRAINING"}
    world.desired = Desired(2, (model(2),), stopping=True)
    world.tick()
    assert world.states() == {"m-1": "DRAINING"}


def test_what_nobody_knows_is_released() -> None:
    world = World(model(0), nodes(1))
    world.seen["stranger-7"] = SERVING
    world.tick()
    assert world.actions(Release) == [Release("stranger-7")]


def test_ended_replicas_are_forgotten_beyond_a_bound() -> None:
    world = World(model(0), nodes(1))
    world.desired = Desired(1, (model(1),))
    for _ in range(60):
        world.desired = Desired(1, (model(1),))
        world.tick()
        world.desired = Desired(1, (model(0),))
        world.tick()
    assert sum(replica.state is ReplicaState.STOPPED for replica in world.fleet.replicas) <= LIMITS.ended_kept + 1
    assert world.fleet.serial == 60


@pytest.mark.parametrize("missing", ["process", "reservation"])
def test_a_ready_replica_that_is_gone_from_sight_has_failed(missing: str) -> None:
    world = World(model(1), nodes(1))
    world.until_ready()
    gone = (
        ReplicaObservation(Reservation.GRANTED)
        if missing == "process"
        else replace(SERVING, reservation=Reservation.NONE)
    )
    world.seen["m-1"] = gone
    world.tick()
    assert world.states()["m-1"] == "FAILED"


def test_a_spec_that_was_rolled_back_can_be_tried_again() -> None:
    old, new = model(1), model(1, dtype="float32")
    world = World(old, nodes(2))
    world.until_ready()
    world.want(new, previous={"m": old})
    world.fleet = replace(world.fleet, health={"m": ModelHealth(2, 0.0, new.revision, "exit status 1")})
    world.tick()
    assert world.actions(RollBack)
    world.want(old, previous={})  # what the controller does with it
    world.tick()
    world.want(new, previous={"m": old})
    world.tick()
    assert not world.actions(RollBack)
    assert [replica.revision for replica in world.fleet.replicas if replica.state == "RESERVING"] == [new.revision]


def test_a_spec_that_was_rolled_back_can_be_tried_again_at_once() -> None:
    old, new = model(1), model(1, dtype="float32")
    world = World(old, nodes(2))
    world.until_ready()
    world.want(new, previous={"m": old})
    world.fleet = replace(world.fleet, health={"m": ModelHealth(2, 1e9, new.revision, "exit status 1")})
    world.tick()
    assert world.actions(RollBack)
    world.want(new, previous={"m": old})  # applied again before a tick saw the old spec
    world.tick()
    assert not world.actions(RollBack)


def test_a_replica_killed_soon_after_it_served_did_not_fail_to_start() -> None:
    world = World(model(), nodes(2))
    world.until_ready()
    killed = ReplicaObservation(
        Reservation.GRANTED, Phase.EXITED, FACTS, "killed by SIGKILL", ExitCause.KILLED_FROM_OUTSIDE
    )
    world.seen["m-1"] = killed
    world.tick(0.1)
    ended = world.fleet.replica("m-1")
    assert ended is not None
    assert (ended.exit_cause, ended.reason) == (ExitCause.KILLED_FROM_OUTSIDE, "killed by SIGKILL")
    before = world.fleet
    text = "a replica died soon after it served: killed by SIGKILL"
    assert before.blocked["m"] == Block(BlockedKind.STARTS, text, passes=True)
    retry_s = before.retry_s("m")
    assert retry_s is not None
    assert retry_s > world.now
    world.tick(0.1)
    assert world.fleet.blocked == before.blocked, "a countdown would be a change in every tick"


@pytest.mark.parametrize("cause", [ExitCause.NODE_LOST, ExitCause.PROGRAM_ENDED])
def test_a_lost_node_is_told_by_its_cause_and_not_by_a_sentence(cause: ExitCause) -> None:
    world = World(model(), nodes(2))
    world.until_ready()
    reason = "its node died" if cause is ExitCause.NODE_LOST else "node lost: so the worker says"
    world.seen["m-1"] = ReplicaObservation(Reservation.GRANTED, Phase.EXITED, FACTS, reason, cause)
    world.tick(0.1)
    assert ("m" in world.fleet.health) == (cause is ExitCause.PROGRAM_ENDED)


def test_the_replacement_of_a_replica_lost_with_its_node_waits_until_its_lease_is_over() -> None:
    world = World(model(), nodes(1, 1))
    world.until_ready()
    (lost,) = world.fleet.replicas
    world.seen["m-1"] = replace(SERVING, lease_until_s=world.now + 20.0)
    gone = lost.placement.driver_node
    kept = [replace(node, alive=node.id != gone) for node in world.inventory.nodes]
    world.inventory = Inventory(tuple(kept))
    world.tick()
    assert world.states() == {"m-1": "FAILED"}
    assert world.fleet.replicas[0].exit_cause is ExitCause.NODE_LOST
    assert world.fleet.blocked["m"].text.startswith("m-1 (node lost: n0) may serve until its lease ends")
    del world.seen["m-1"]  # Ray forgets it; its lease is remembered all the same
    world.tick(18.0)
    assert world.states() == {"m-1": "FAILED"}
    world.tick(1.0)
    assert world.states() == {"m-1": "FAILED", "m-2": "RESERVING"}
    assert not world.fleet.blocked


def test_one_that_never_served_and_one_that_is_known_to_have_ended_are_replaced_at_once() -> None:
    starting = World(model(), nodes(1, 1))
    starting.tick()
    starting.seen["m-1"] = replace(STARTING, lease_until_s=starting.now + 20.0)
    starting.tick()
    node = starting.fleet.replicas[0].placement.driver_node
    starting.inventory = Inventory(tuple(replace(n, alive=n.id != node) for n in starting.inventory.nodes))
    starting.tick()
    del starting.seen["m-1"]
    starting.tick()
    assert starting.states()["m-2"] == "RESERVING"
    killed = World(model(), nodes(1, 1))
    killed.until_ready()
    killed.tick(60)
    killed.seen["m-1"] = ReplicaObservation(
        Reservation.GRANTED,
        Phase.EXITED,
        FACTS,
        "killed by SIGKILL",
        ExitCause.KILLED_FROM_OUTSIDE,
        lease_until_s=killed.now + 20.0,
    )
    killed.tick()
    assert killed.states() == {"m-1": "FAILED", "m-2": "RESERVING"}


@pytest.mark.parametrize(
    ("hang", "cause", "words"),
    [
        (Hang.NO_STEP, ExitCause.HUNG, "its engine has requests and has made no step for 61 s"),
        (Hang.NO_TOKEN, ExitCause.HUNG, "its idle engine was asked for a token"),
        (Hang.NO_ANSWER, ExitCause.NO_ANSWER, "its worker has not answered for 61 s"),
    ],
)
@pytest.mark.parametrize("draining", [False, True])
def test_a_replica_that_hangs_is_replaced_and_the_reason_names_its_ranks(
    hang: Hang, cause: ExitCause, words: str, draining: bool
) -> None:
    world = World(model(), nodes(2))
    world.until_ready()
    if draining:
        world.want(model(), drain_requests={"m-1": 300.0})
        world.tick()
    world.seen["m-1"] = replace(SERVING, hang=HangSeen(hang, 61.0))
    world.tick()
    (replica,) = [replica for replica in world.fleet.replicas if replica.id == "m-1"]
    assert (replica.state, replica.exit_cause) == (ReplicaState.FAILED, cause)
    assert words in replica.reason
    assert "rank 0: n0 device 0" in replica.reason
    assert world.actions(Release) == [Release("m-1")], "what hangs is ended, its devices come free"


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        (
            (PartSeen("n0", "worker", 7), PartSeen("n0", "rank 1", 9, "stopped")),
            "(rank 1: n0 device 1: process 9 is stopped)",
        ),
        ((PartSeen("n0", "engine", 8, "stopped"),), "(its engine on n0: process 8 is stopped)"),
        ((PartSeen("n0", "rank 0", 9), PartSeen("n1")), "(n1 does not answer)"),
        ((PartSeen("n0", "rank 0", 9),), "(rank 0: n0 device 0, rank 1: n0 device 1)"),
    ],
)
def test_the_reason_of_a_hang_names_the_rank_and_process_that_stand_still(
    parts: tuple[PartSeen, ...], said: str
) -> None:
    world = World(model(parallel={"tensor": 2}), nodes(2))
    world.until_ready()
    world.seen["m-1"] = replace(SERVING, hang=HangSeen(Hang.NO_STEP, 61.0, parts))
    world.tick()
    assert world.fleet.replicas[0].reason.endswith(said)
