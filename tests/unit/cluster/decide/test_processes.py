"""Routers, edges and agents: which should run, and how changes and failures are met."""

from dataclasses import replace
from typing import Any

from megatoken.cluster.decide.backend import ProcessObservation
from megatoken.cluster.decide.fleet import Fleet, Phase, Replica
from megatoken.cluster.decide.launches import LaunchContext
from megatoken.cluster.decide.processes import (
    BACKOFF_MAX_S,
    SETTLED_S,
    Decision,
    Record,
    Wanted,
    supervise,
    wanted_processes,
)
from megatoken.cluster.decide.replica import ReplicaState
from megatoken.cluster.inventory.topology import Device, Inventory, Node
from megatoken.cluster.placement.place import Placement, Rank
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


def test_no_process_is_exchanged_for_a_spec_that_says_the_same_in_more_words() -> None:
    edge = {"count": 1, "max_requests": 9}
    spec = ClusterSpec.model_validate(
        {
            "models": [{"name": "a", "source": "x"}],
            "routers": {"resume": {"wait_s": 240}, "limits": {}, "policy": "prefix"},
            "edge": edge,
            "agents": {"tick_s": 2, "deadline_s": 10},
            "tracing": {"endpoint": "http://10.0.0.9:4317"},
        }
    )
    read_back = ClusterSpec.model_validate_json(spec.model_dump_json())  # as the controller's state keeps it
    one, other = (wanted_processes(said, Inventory((HEAD, OTHER)), Fleet(), AROUND) for said in (spec, read_back))
    assert [entry.launch.name for entry in one] == [entry.launch.name for entry in other]


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


def test_agents_run_on_the_head_and_wherever_something_serves() -> None:
    third = Node("cccccccccccc", "10.0.0.2", (Device("cpu", 0),), name="third")
    nodes = Inventory((HEAD, OTHER, third))
    one = Replica("m-1", "m", "v1", 1, Placement("m-1", "m", (Rank(0, third.id, 0, "cpu"),)), 0.0)

    def agents(fleet: Fleet, **spec: Any) -> list[str]:
        found = wanted_processes(ClusterSpec.model_validate(spec), nodes, fleet, AROUND)
        return [entry.slot for entry in found if entry.kind == "agent"]

    assert agents(Fleet()) == ["agent-0"]
    assert agents(Fleet((one,))) == ["agent-0", "agent-cccccccc-0"]
    assert agents(Fleet((replace(one, state=ReplicaState.FAILED),))) == ["agent-0"]
    everywhere = agents(Fleet(), routers={"per_node": True})
    assert everywhere == ["agent-0", "agent-bbbbbbbb-0", "agent-cccccccc-0"]


def test_without_a_head_the_first_node_that_lives_is_taken_for_it() -> None:
    dead, alive = replace(HEAD, alive=False), OTHER
    assert [(e.slot, e.launch.node) for e in wanted((dead, alive), agents={"enabled": False})] == [
        ("router-0", OTHER.id)
    ]


def test_an_edge_asks_the_router_of_its_node_where_there_is_one() -> None:
    model = [{"name": "a", "source": "x"}]

    def near(**routers: Any) -> list[tuple[str, bool]]:
        spec = {"agents": {"enabled": False}, "models": model, "edge": {"per_node": True}, "routers": routers}
        found = wanted((HEAD, OTHER), replace(AROUND, local=False), **spec)
        return [
            (entry.slot, str(entry.launch.settings["router"]).startswith(OTHER.address))
            for entry in found
            if entry.kind == "edge"
        ]

    assert near(per_node=True) == [("edge-0", False), ("edge-bbbbbbbb-0", True)]
    assert near(per_node=False) == [("edge-0", False), ("edge-bbbbbbbb-0", False)]


def test_a_process_that_served_for_long_starts_its_count_of_failures_anew() -> None:
    name = wanted(agents={"enabled": False})[0].launch.name
    for after_s, failures in ((SETTLED_S - 0.1, 3), (SETTLED_S, 0)):
        record = Record("router", "router-0", HEAD.id, state="READY", since_s=100.0, failures=3)
        decision = supervise(wanted(agents={"enabled": False}), {name: SERVES}, {name: record}, 100.0 + after_s)
        assert decision.records[name].failures == failures
        assert decision.changed == ()


def test_a_process_that_is_not_seen_any_more_is_started_again_at_once() -> None:
    entries = wanted(agents={"enabled": False})
    name = entries[0].launch.name
    record = Record("router", "router-0", HEAD.id, state="READY", since_s=1.0)
    decision = supervise(entries, {}, {name: record}, 100.0)
    assert [launch.name for launch in decision.start] == [name]
    assert decision.changed == ((name, replace(record, state="STARTING", since_s=100.0)),)
    waits = replace(record, state="FAILED", not_before_s=100.1)
    assert supervise(entries, {}, {name: waits}, 100.0).start == ()
    assert supervise(entries, {}, {name: waits}, 100.1).start != ()


def test_whoever_is_not_wanted_gets_its_grace_and_what_has_ended_none() -> None:
    def stopped(seen: ProcessObservation, records: dict[str, Record]) -> Decision:
        return supervise((), {"router-0.abc": seen}, records, 5.0)

    record = Record("router", "router-0", HEAD.id, state="READY", grace_s=35.0)
    decision = stopped(SERVES, {"router-0.abc": record})
    assert decision.stop == (("router-0.abc", 35.0),)
    assert decision.records["router-0.abc"].reason == "no longer wanted"
    assert decision.changed[0][1].state == "DRAINING"
    assert stopped(ProcessObservation(Phase.EXITED), {"router-0.abc": record}).stop == (("router-0.abc", 0.0),)
    unknown = stopped(SERVES, {})  # of an earlier controller
    assert unknown.stop == (("router-0.abc", 2.0),)
    assert unknown.records["router-0.abc"].slot == "router-0"


def test_what_replaces_a_process_is_told_from_what_ends_it() -> None:
    entries = wanted(agents={"enabled": False})
    old = Record("router", "router-0", HEAD.id, state="READY", grace_s=35.0)
    strange = Record("router", "router-7", HEAD.id, state="READY", grace_s=35.0)
    new = entries[0].launch.name
    records = {new: replace(old), "router-0.old": old, "router-7.old": strange}
    decision = supervise(entries, dict.fromkeys(records, SERVES), records, 5.0)
    reasons = {name: record.reason for name, record in decision.records.items()}
    assert reasons == {new: "", "router-0.old": "replaced", "router-7.old": "no longer wanted"}
    assert [name for name, _ in decision.changed] == ["router-0.old", "router-7.old"]
