"""The state file: what one controller wrote, the next one reads."""

import json
import sqlite3
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from megatoken.cluster.controller.state import StateStore
from megatoken.cluster.decide.cordon import Cordon
from megatoken.cluster.decide.exit_cause import ExitCause
from megatoken.cluster.decide.fleet import Fleet, Replica, WorkerFacts, on_this_clock
from megatoken.cluster.decide.replica import ReplicaState
from megatoken.cluster.placement.place import Placement, Rank
from megatoken.cluster.spec.cluster import default_spec


def replica(number: int, state: ReplicaState = ReplicaState.READY) -> Replica:
    placement = Placement(f"m-{number}", "m", (Rank(0, "n0", 0, "cpu"), Rank(1, "n1", 0, "cpu", stage=1)))
    facts = WorkerFacts("127.0.0.1:1", 2**62, "vllm", max_model_len=2048)
    return Replica(f"m-{number}", "m", "abc", 1, placement, 10.0, state, 11.0, "why", facts, 99.5, "scale")


def test_everything_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "state.sqlite"
    store = StateStore(path)
    assert store.spec() is None
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    spec = default_spec()
    assert store.put_spec(spec, {}) == 1
    changed = spec.models[0].model_copy(update={"dtype": "float32"})
    assert store.put_spec(spec.with_model(changed), {changed.name: spec.models[0]}) == 2
    store.save_fleet(Fleet((replica(1), replica(2)), serial=2))
    store.drain_node("n1")
    store.drain_replica("m-2", 5.0)
    store.put(epoch="7")
    store.put_ports({"routers.port": 1234})
    store.close()

    again = StateStore(path)
    assert again.spec() == spec.with_model(changed)
    fleet = again.fleet()
    assert fleet.replicas == (replica(1), replica(2))
    assert fleet.serial == 2
    desired = again.desired()
    assert (desired.generation, desired.drained_nodes, dict(desired.drain_requests)) == (2, {"n1"}, {"m-2": 5.0})
    assert desired.previous == {changed.name: spec.models[0]}
    assert (again.get("epoch"), again.ports()) == ("7", {"routers.port": 1234})


def test_a_save_writes_changes_and_forgets_what_is_gone(tmp_path: Path) -> None:
    store = StateStore(tmp_path / "state.sqlite")
    store.save_fleet(Fleet((replica(1), replica(2)), serial=2))
    store.drain_replica("m-1", 5.0)
    moved = replace(replica(2), state=ReplicaState.DRAINING)
    store.save_fleet(Fleet((moved,), serial=3))
    assert store.fleet().replicas == (moved,)
    assert store.desired().drain_requests == {}
    store.drain_node("n1")
    store.drain_node("n1", undo=True)
    assert store.desired().drained_nodes == frozenset()
    store.cordon(("n1", 3), Cordon("hot"))
    store.cordon(("n1", 4), Cordon("hot", returning=True))
    assert store.desired().cordons == {("n1", 3): Cordon("hot"), ("n1", 4): Cordon("hot", returning=True)}
    store.cordon(("n1", 3), None)
    assert store.desired().cordons.keys() == {("n1", 4)}
    store.forget_previous(["m"])
    assert store.desired(stopping=True).stopping


def test_the_cause_of_an_end_is_kept_and_a_file_without_it_still_loads(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite"
    store = StateStore(path)
    ended = replace(replica(1, ReplicaState.FAILED), exit_cause=ExitCause.NODE_LOST)
    store.save_fleet(Fleet((ended,), serial=1))
    assert store.fleet().replicas == (ended,)
    store.close()
    with sqlite3.connect(path) as connection:
        ((value,),) = connection.execute("SELECT value FROM replicas").fetchall()
        older = json.loads(value)
        del older["exit_cause"]
        connection.execute("UPDATE replicas SET value = ?", (json.dumps(older),))
    again = StateStore(path)
    assert again.fleet().replicas == (replace(ended, exit_cause=ExitCause.UNKNOWN),)
    again.close()


@pytest.mark.parametrize("damage", ["emptied", "cut off", "something else"])
def test_a_damaged_file_is_set_aside_and_a_new_one_begun(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "state.sqlite"
    store = StateStore(path)
    store.put_spec(default_spec(), {})
    store.save_fleet(Fleet((replica(1), replica(2)), serial=2))
    store.close()
    whole = path.read_bytes()
    kept = {"emptied": b"", "cut off": whole[: len(whole) // 2 + 100], "something else": bytes(range(256)) * 64}[damage]
    path.write_bytes(kept)
    again = StateStore(path)
    assert again.spec() is None
    assert again.fleet() == Fleet()
    again.put(epoch="7")
    again.close()
    if kept:
        assert path.with_name("state.sqlite.damaged").read_bytes() == kept
    assert StateStore(path).get("epoch") == "7"


def test_times_of_a_clock_that_began_anew_keep_their_distances() -> None:
    early = replace(replica(1), since_s=5000.0, created_s=4990.0, drain_deadline_s=5030.0)
    lost = replace(replica(2, ReplicaState.FAILED), since_s=5010.0, drain_deadline_s=None, serves_until_s=5040.0)
    fleet = Fleet((early, lost), serial=2)
    assert on_this_clock(fleet, 6000.0) == fleet
    first, second = on_this_clock(fleet, 100.0).replicas
    assert (first.created_s, first.since_s, first.drain_deadline_s, first.serves_until_s) == (80.0, 90.0, 120.0, 0.0)
    assert (second.since_s, second.drain_deadline_s, second.serves_until_s) == (100.0, None, 130.0)
    assert on_this_clock(Fleet(), 1.0) == Fleet()
