"""Orders: what they change, what they refuse, and what an update can return to."""

from pathlib import Path
from typing import Any

import pytest

from megatoken.cluster.controller.desired_state import DesiredState
from megatoken.cluster.controller.state import StateStore
from megatoken.cluster.decide.cordon import Cordon
from megatoken.cluster.decide.fleet import ClusterEvent, Fleet, Replica
from megatoken.cluster.decide.replica import ReplicaState
from megatoken.cluster.inventory.topology import Device, Inventory, Node
from megatoken.cluster.placement.place import Placement, Rank
from megatoken.cluster.spec.cluster import ClusterSpec
from megatoken.cluster.spec.load import SpecError
from megatoken.errors import NotFoundError, RequestError

CPU = (Device("cpu", 0), Device("cpu", 1))
NODES = Inventory((Node("aaaaaaaa1", "10.0.0.1", CPU, name="x"), Node("aaaaaaaa2", "10.0.0.2", CPU, name="y")))


def spec(**changes: Any) -> ClusterSpec:
    model = {"name": "m", "engine": "simulated", **changes}
    return ClusterSpec.model_validate({"models": [model]})


def fleet_of(revision: str, state: ReplicaState = ReplicaState.READY) -> Fleet:
    placement = Placement("m-1", "m", (Rank(0, "aaaaaaaa1", 0, "cpu"),))
    return Fleet((Replica("m-1", "m", revision, 1, placement, 0.0, state),))


class Told:
    def __init__(self, directory: Path) -> None:
        store = StateStore(directory / "state.sqlite")
        store.put_spec(spec(), {})
        self.events: list[ClusterEvent] = []
        self.woken = 0
        self.store = store
        self.desired_state = DesiredState(store, self.events.append, self._wake)

    def _wake(self) -> None:
        self.woken += 1


@pytest.fixture
def told(tmp_path: Path) -> Told:
    return Told(tmp_path)


def test_scale_wakes_the_loop_and_survives_a_restart(told: Told) -> None:
    assert told.desired_state.scale("m", 5) == 2
    assert told.woken == 1
    assert told.desired_state.scale("m", 5) == 2  # nothing changes
    again = DesiredState(told.store, told.events.append, lambda: None)
    assert again.desired.models[0].replicas == 5
    with pytest.raises(NotFoundError, match="one of: m"):
        told.desired_state.scale("n", 1)


def test_a_number_that_follows_the_load_is_resized_by_it_alone_and_kept_by_apply(told: Told) -> None:
    bounds = {"autoscale": {"min_replicas": 1, "max_replicas": 4}}
    told.desired_state.apply(spec(**bounds), Fleet(), dry_run=False)
    told.desired_state.resize("m", 3, "what arrives needs more")
    assert told.events[-1].message == "1 -> 3 replicas: what arrives needs more"
    assert told.events[-1].cause == "autoscale"
    with pytest.raises(RequestError, match=r"replicas: 2 is not allowed; its number follows the load \(1 to 4\)"):
        told.desired_state.scale("m", 2)
    assert told.desired_state.apply(spec(**bounds), Fleet(), dry_run=False)[1] == []
    assert told.desired_state.desired.models[0].replicas == 3
    told.desired_state.apply(spec(autoscale={"min_replicas": 1, "max_replicas": 2}), Fleet(), dry_run=False)
    assert told.desired_state.desired.models[0].replicas == 2
    assert spec(**bounds).models[0].revision == spec().models[0].revision, "no replica is exchanged for it"
    generation = told.desired_state.desired.generation
    told.desired_state.resize("m", 2, "the same")
    told.desired_state.resize("gone", 1, "no model")
    assert told.desired_state.desired.generation == generation


def test_a_dry_run_and_an_equal_spec_change_nothing(told: Told) -> None:
    changed = spec(replicas=4, max_running=7)
    _, changes = told.desired_state.apply(changed, Fleet(), dry_run=True)
    assert changes == [
        "model m: max_running changes; replicas are exchanged, 1 extra at most",
        "model m: 1 -> 4 replicas",
    ]
    assert told.desired_state.apply(spec(), Fleet(), dry_run=False) == (1, [])
    assert told.woken == 0


def test_what_needs_a_new_cluster_is_refused(told: Told) -> None:
    with pytest.raises(SpecError, match="control: cannot be changed while the cluster runs"):
        told.desired_state.apply(ClusterSpec.model_validate({"control": {"port": 1}}), Fleet(), dry_run=False)
    assert told.desired_state.desired.generation == 1


def test_an_update_of_a_working_model_can_be_rolled_back_and_one_that_never_worked_cannot(told: Told) -> None:
    before = told.desired_state.spec.models[0]
    told.desired_state.apply(spec(max_running=7), Fleet(), dry_run=False)
    assert told.desired_state.desired.previous == {}
    told.desired_state.apply(spec(), fleet_of("x"), dry_run=False)
    told.desired_state.apply(spec(max_running=8), fleet_of(before.revision), dry_run=False)
    assert told.desired_state.desired.previous == {"m": before}
    told.desired_state.apply(spec(max_running=9), fleet_of(before.revision), dry_run=False)
    assert told.desired_state.desired.previous == {"m": before}  # 8 was never seen to work
    told.desired_state.scale("m", 3)
    told.desired_state.roll_back("m")
    assert told.desired_state.spec.models[0] == before.model_copy(update={"replicas": 3})
    assert told.desired_state.desired.previous == {}


def test_processes_see_an_update_once_a_replica_of_it_serves_and_never_one_that_fails(told: Told) -> None:
    before = told.desired_state.spec.models[0]
    told.desired_state.apply(spec(max_running=8), fleet_of(before.revision), dry_run=False)
    after = told.desired_state.spec.models[0]
    for fleet, model in [
        (fleet_of(before.revision), before),
        (fleet_of(after.revision, ReplicaState.STARTING), before),
        (Fleet(), before),
        (fleet_of(after.revision), after),
    ]:
        assert told.desired_state.proven_spec(fleet).models == (model,)
    told.desired_state.roll_back("m")
    assert told.desired_state.proven_spec(Fleet()).models == (before,)


def test_an_update_is_over_when_every_replica_runs_it(told: Told) -> None:
    before = told.desired_state.spec.models[0]
    told.desired_state.apply(spec(max_running=8), fleet_of(before.revision), dry_run=False)
    told.desired_state.settle_updates(fleet_of(before.revision))
    assert told.desired_state.desired.previous
    told.desired_state.settle_updates(fleet_of(told.desired_state.spec.models[0].revision))
    assert not told.desired_state.desired.previous
    assert told.events[-1].kind == "model.updated"


def test_drains(told: Told) -> None:
    fleet = fleet_of("r")
    assert told.desired_state.drain_replica("m-1", None, fleet) == ["m-1"]
    assert told.desired_state.desired.drain_requests == {"m-1": 60.0}
    with pytest.raises(NotFoundError, match="one of: m-1"):
        told.desired_state.drain_replica("m-9", None, fleet)
    for name in ("x", "10.0.0.1", "aaaaaaaa1"):
        assert told.desired_state.drain_node(name, NODES, fleet, undo=False) == ["m-1"]
    assert told.desired_state.desired.drained_nodes == {"aaaaaaaa1"}
    assert told.desired_state.drain_node("x", NODES, fleet, undo=True) == []
    assert told.desired_state.desired.drained_nodes == frozenset()
    with pytest.raises(RequestError, match="several nodes"):
        told.desired_state.drain_node("aaaaaaaa", NODES, fleet, undo=False)
    with pytest.raises(NotFoundError, match="one of: x, y"):
        told.desired_state.drain_node("z", NODES, fleet, undo=False)


def test_a_shutdown_is_remembered(told: Told) -> None:
    told.desired_state.shut_down(3.0, fleet_of("r"))
    again = DesiredState(told.store, told.events.append, lambda: None)
    assert again.desired.stopping
    assert again.desired.drain_requests == {"m-1": 3.0}


def test_a_cordon_is_kept_until_a_check_passes(told: Told) -> None:
    fleet, desired_state = fleet_of("r"), told.desired_state
    assert desired_state.cordon("x", 0, "its fan is loud", NODES, fleet) == ["m-1"]
    assert desired_state.cordon("10.0.0.1", 1, "", NODES, fleet) == []
    assert desired_state.desired.cordons == {("aaaaaaaa1", 0): Cordon("its fan is loud"), ("aaaaaaaa1", 1): Cordon()}
    with pytest.raises(RequestError, match=r"device: 'x:7' is not allowed; one of this node's: 0, 1"):
        desired_state.cordon("x", 7, "", NODES, fleet)
    with pytest.raises(RequestError, match=r"'y:0' is not allowed; a cordoned device"):
        desired_state.uncordon("y", 0, NODES)
    desired_state.uncordon("x", 0, NODES)
    assert desired_state.desired.cordons["aaaaaaaa1", 0].returning
    node = NODES.nodes[0]
    desired_state.end_check(node, 0, "2 bytes did not keep")
    assert desired_state.desired.cordons["aaaaaaaa1", 0] == Cordon("a check: 2 bytes did not keep")
    desired_state.end_check(node, 0, "")
    desired_state.end_check(node, 0, "")  # of a device that is not cordoned: nothing to do
    assert desired_state.desired.cordons.keys() == {("aaaaaaaa1", 1)}
    said = [(event.subject, event.message) for event in told.events if event.kind == "device.cordon"]
    assert said == [
        ("x:0", "its fan is loud"),
        ("x:1", "cordon asked for"),
        ("x:0", "it is checked before it returns"),
        ("x:0", "2 bytes did not keep"),
        ("x:0", "back in service"),
    ]
