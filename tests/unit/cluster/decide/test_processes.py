"""Routers, edges and agents: which should run, and how changes and failures are met."""

from dataclasses import replace
from typing import Any

from megatoken.cluster.decide.backend import ProcessObservation
from megatoken.cluster.decide.fleet import Fleet, Phase
from megatoken.cluster.decide.launches import LaunchContext
from megatoken.cluster.decide.processes import BACKOFF_MAX_S, Decision, Record, Wanted, supervise, wanted_processes
from megatoken.cluster.inventory.topology import Device, Inventory, Node
from megatoken.cluster.spec.cluster import ClusterSpec

AROUND = LaunchContext("127.0.0.1:7700", {"routers.port": 1, "edge.port": 2, "agents.port": 3}, "10.0.0.0:6379", True)
HEAD = Node("aaaaaaaaaaaa", "10.0.0.0", (Device("cpu", 0),), name="head", head=True)
OTHER = Node("bbbbbbbbbbbb", "10.0.0.1", (Device("cpu", 0),), name="other")
SERVES = ProcessObservation(Phase.SERVING, {"address": "127.0.0.1:1"})


def wanted(nodes: tuple[Node, ...] = (HEAD,), context: LaunchContext = AROUND, **spec: Any) -> tuple[Wanted, ...]:
    return wanted_processes(ClusterSpec.model_validate(spec), Inventory(nodes), Fleet(), context)


def slots(found: tuple[Wanted, ...]) -> list[str]:
    return sorted(entry.slot for entry in found)


def test_an_edge_runs_where_a_model_has_a_tokenizer() -> None:
    assert slots(wanted()) == ["agent-0", "router-0"]
    assert slots(wanted(models=[{"name": "a", "source": "x"}])) == ["agent-0", "edge-0", "router-0"]
    assert slots(wanted(models=[{"name": "a", "engine": "simulated"}])) == ["agent-0", "router-0"]
    assert slots(wanted(agents={"enabled": False})) == ["router-0"]
    assert wanted(()) == ()


def test_per_node_and_counts() -> None:
    assert slots(wanted((HEAD, OTHER), routers={"count": 2}, agents={"enabled": False})) == ["router-0", "router-1"]
    each = wanted((HEAD, OTHER), routers={"per_node": True}, agents={"enabled": False})
    assert [(entry.slot, entry.launch.node) for entry in each] == [
        ("router-0", HEAD.id),
        ("router-bbbbbbbb-0", OTHER.id),
    ]
    assert slots(wanted((HEAD, replace(OTHER, alive=False)), routers={"per_node": True})) == ["agent-0", "router-0"]


def test_a_name_changes_with_the_configuration_and_only_with_it() -> None:
    def name(**spec: Any) -> str:
        return next(entry.launch.name for entry in wanted(**spec) if entry.slot == "router-0")

    assert name() == name()
    assert name() == name(models=[{"name": "a", "engine": "simulated"}])
    assert name() != name(routers={"policy": "round_robin"})


def test_hosts_are_loopback_on_one_machine_and_the_nodes_own_elsewhere() -> None:
    (router,) = wanted(agents={"enabled": False})
    assert router.launch.config.host == "127.0.0.1"
    (router,) = wanted(agents={"enabled": False}, context=replace(AROUND, local=False), ray={"address": "auto"})
    assert router.launch.config.host == "10.0.0.0"
    (router,) = wanted(agents={"enabled": False}, routers={"host": "0.0.0.0"})
    assert router.launch.config.host == "0.0.0.0"


class Loop:
    """Supervises one slot over time."""

    def __init__(self) -> None:
        self.records: dict[str, Record] = {}
        self.now = 0.0

    def tick(self, entries: tuple[Wanted, ...], seen: dict[str, ProcessObservation], seconds: float = 1.0) -> Decision:
        self.now += seconds
        decision = supervise(entries, seen, self.records, self.now)
        self.records = dict(decision.records)
        return decision


def test_start_serve_fail_and_start_again_after_a_growing_pause() -> None:
    loop, entries = Loop(), wanted(agents={"enabled": False})
    name = entries[0].launch.name
    assert [launch.name for launch in loop.tick(entries, {}).start] == [name]
    assert loop.tick(entries, {name: ProcessObservation(Phase.STARTING)}).start == ()
    loop.tick(entries, {name: SERVES})
    assert loop.records[name].state == "READY"
    pauses = []
    for _ in range(7):
        ended = loop.tick(entries, {name: ProcessObservation(Phase.EXITED, None, "exit status 1: boom")})
        assert ended.stop == ((name, 0.0),)
        assert (loop.records[name].state, loop.records[name].reason) == ("FAILED", "exit status 1: boom")
        began = loop.now
        while not loop.tick(entries, {}, 0.5).start:
            pass
        pauses.append(loop.now - began)
        loop.tick(entries, {name: SERVES})
    assert pauses == sorted(pauses)
    assert pauses[0] == 1.0
    assert pauses[-1] == BACKOFF_MAX_S
    loop.tick(entries, {name: SERVES}, 60.0)
    assert loop.records[name].failures == 0


def test_a_changed_configuration_starts_beside_the_old_one_which_drains_once_the_new_one_serves() -> None:
    loop = Loop()
    before = wanted(agents={"enabled": False})
    after = wanted(agents={"enabled": False}, routers={"policy": "round_robin"})
    old, new = before[0].launch.name, after[0].launch.name
    loop.tick(before, {})
    loop.tick(before, {old: SERVES})
    decision = loop.tick(after, {old: SERVES})
    assert [launch.name for launch in decision.start] == [new]
    assert decision.stop == ()
    assert loop.tick(after, {old: SERVES, new: ProcessObservation(Phase.STARTING)}).stop == ()
    loop.tick(after, {old: SERVES, new: SERVES})
    decision = loop.tick(after, {old: SERVES, new: SERVES})
    assert [name for name, _ in decision.stop] == [old]
    assert loop.records[old].state == "DRAINING"
    loop.tick(after, {new: SERVES})
    assert set(loop.records) == {new}


def test_what_is_no_longer_wanted_stops() -> None:
    loop, entries = Loop(), wanted(agents={"enabled": False})
    name = entries[0].launch.name
    loop.tick(entries, {})
    loop.tick(entries, {name: SERVES})
    assert [stopped for stopped, _ in loop.tick((), {name: SERVES}).stop] == [name]
