"""Who is in the next epoch: the controller's rules, one by one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatoken.worker.throughput.decide.group import (
    Attended,
    Attendee,
    Group,
    GroupPolicy,
    Groups,
    RefusalKind,
    Refused,
    Stance,
    common_backend,
)

POLICY = GroupPolicy()


def attendee(name: str, **facts: object) -> Attendee:
    made = Attendee(name, f"node-{name}", "", f"{name}:1", f"{name}:2")
    return replace(made, **facts)  # type: ignore[arg-type]


class Room:
    """Agents that attend ten times a second and behave, except where a test says otherwise."""

    def __init__(self, names: str = "", policy: GroupPolicy = POLICY) -> None:
        self.groups = Groups(policy)
        self.now = 100.0
        self.agents: dict[str, Attended] = {name: Attended(attendee(name)) for name in names}
        self.silent: set[str] = set()
        self.broken: dict[str, tuple[str, ...]] = {}
        self.published: list[Group] = []

    def pass_s(self, seconds: float) -> list[Group]:
        """Lets time pass; returns the groups that were published meanwhile."""
        before = len(self.published)
        for _ in range(round(seconds * 10)):
            self.now += 0.1
            for name, said in list(self.agents.items()):
                if name not in self.silent:
                    self.agents[name] = said = self._stance(name, said)
                    self.groups.attended(said, self.now)
            group = self.groups.poll(self.now)
            if group is not None:
                self.published.append(group)
        return self.published[before:]

    def _stance(self, name: str, said: Attended) -> Attended:
        group = self.groups.group
        if group.epoch < said.epoch:  # a new controller: the agent keeps the group it has
            return said
        if name not in group.agents:
            unreached = self.broken.get(name, ())
            return replace(said, epoch=group.epoch, state=Stance.OUTSIDE, members=(), suspects=unreached)
        if name in self.broken:
            return replace(
                said, epoch=group.epoch, state=Stance.FAILED, problem="timed out", suspects=self.broken[name]
            )
        members = group.agents if group.agents[0] == name else ()
        return replace(said, epoch=group.epoch, state=Stance.TICKING, suspects=(), members=members)

    def leave(self, name: str) -> None:
        del self.agents[name]
        self.groups.left(name, self.now)


def test_agents_that_come_together_make_one_group() -> None:
    room = Room("abc")
    (group,) = room.pass_s(2)
    assert (group.epoch, group.agents, group.why) == (1, ("a", "b", "c"), "3 joined")


def test_a_steady_trickle_joins_at_last() -> None:
    room = Room("a")
    for name in "bcdefghijkl":
        room.agents[name] = Attended(attendee(name))
        room.pass_s(0.2)
    assert room.published
    assert room.pass_s(1.5)[-1].agents == tuple("abcdefghijkl")
    assert len(room.published) <= 4


def test_an_agent_whose_stream_ended_is_dropped_at_once() -> None:
    room = Room("abc")
    room.pass_s(2)
    room.leave("b")
    (group,) = room.pass_s(0.1)
    assert (group.epoch, group.agents, group.why) == (2, ("a", "c"), "lost node-b")


def test_a_frozen_agent_is_dropped_after_the_silence_and_comes_back() -> None:
    room = Room("abc")
    room.pass_s(2)
    room.silent.add("a")
    assert room.pass_s(POLICY.silence_s - 0.2) == []
    (group,) = room.pass_s(0.4)
    assert group.agents == ("b", "c")
    room.silent.clear()
    assert room.pass_s(2)[-1].agents == ("b", "c", "a")


def test_a_flapping_node_is_held_out_ever_longer() -> None:
    room = Room("abc")
    room.pass_s(2)
    for _ in range(40):
        room.silent.add("a")
        room.pass_s(2.0)
        room.silent.clear()
        room.pass_s(1.0)
    assert len(room.published) < 20  # two a flap would be 80
    room.pass_s(2 * POLICY.hold_max_s)
    assert "a" in room.groups.group.agents
    assert room.groups.held(room.now) == {}


def test_a_restarted_agent_of_a_node_takes_the_place_of_the_old_one() -> None:
    room = Room("ab")
    room.pass_s(2)
    room.leave("b")
    room.pass_s(0.2)
    room.agents["b2"] = Attended(attendee("b2", node="node-b"))
    assert room.pass_s(1.5)[-1].agents == ("a", "b2")


def test_of_two_agents_on_a_node_the_newest_counts() -> None:
    room = Room("ab")
    room.pass_s(2)
    room.agents["b2"] = Attended(attendee("b2", node="node-b"))
    room.pass_s(2)
    assert room.groups.group.agents == ("a", "b2")
    assert room.groups.refusals() == {"b": Refused(RefusalKind.REPLACED, "node node-b has a newer agent, b2")}


def test_a_failed_group_is_formed_again_with_everyone() -> None:
    room = Room("abc")
    room.pass_s(2)
    room.broken = {"a": (), "b": (), "c": ()}
    (group,) = room.pass_s(0.1)
    room.broken = {}
    assert (group.epoch, group.agents, group.why) == (2, ("a", "b", "c"), "the group failed (timed out)")
    assert room.pass_s(5) == []


def test_a_failure_that_one_member_reports_waits_for_the_others_a_little() -> None:
    room = Room("abc")
    room.pass_s(2)
    room.broken = {"a": ()}
    assert room.pass_s(POLICY.settle_s - 0.1) == []
    (group,) = room.pass_s(0.3)[:1]
    assert group.agents == ("a", "b", "c")


@pytest.mark.parametrize(
    ("reports", "left"),
    [
        ({"a": ("c",), "b": ("c",), "c": ("a", "b")}, "ab"),  # c is cut off from all
        ({"a": ("b",), "b": ("a",), "c": ()}, "ac"),  # one link: the later rank goes
        ({"a": ("b",), "b": (), "c": ()}, "ac"),
        ({"a": ("x",), "b": (), "c": ()}, "abc"),  # accused and long gone
    ],
)
def test_members_that_others_cannot_reach_are_left_out(reports: dict[str, tuple[str, ...]], left: str) -> None:
    room = Room("abc")
    room.pass_s(2)
    room.broken = reports
    (group,) = room.pass_s(0.1)
    assert group.agents == tuple(left)


def test_an_agent_outside_that_cannot_reach_a_member_waits_until_it_can() -> None:
    room = Room("abc")
    room.pass_s(2)
    room.broken = {"a": ("b",), "b": ("a",)}
    assert room.pass_s(0.5)[-1].agents == ("a", "c")
    room.broken = {"b": ("a",)}
    assert room.pass_s(20) == []
    room.broken = {"b": ("gone",)}
    assert room.pass_s(2)[-1].agents == ("a", "c", "b")


def test_a_group_that_keeps_failing_with_nobody_to_blame_is_tried_ever_more_rarely() -> None:
    room = Room("abc")
    room.pass_s(2)
    room.broken = {"a": (), "b": (), "c": ()}
    first, later = len(room.pass_s(10)), len(room.pass_s(100))
    assert 3 <= first <= 8
    assert later <= 8
    room.broken = {}
    room.pass_s(POLICY.hold_max_s)
    assert room.pass_s(10) == []


def test_when_the_controller_itself_stood_still_nobody_is_dropped() -> None:
    room = Room("abc")
    room.pass_s(2)
    room.now += 30
    assert room.groups.poll(room.now) is None
    assert room.pass_s(3) == []


def test_other_versions_and_backends_are_refused_with_a_reason() -> None:
    room = Room("ab")
    room.agents["old"] = Attended(attendee("old", wire_version=0))
    room.agents["gpu"] = Attended(attendee("gpu", backends=("nccl/cuda",)))
    room.agents["none"] = Attended(attendee("none", backends=()))
    room.pass_s(3)
    assert room.groups.group.agents == ("a", "b")
    refused = room.groups.refusals()
    assert {agent: said.kind for agent, said in refused.items()} == {
        "old": RefusalKind.WIRE_VERSION,
        "gpu": RefusalKind.BACKEND,
        "none": RefusalKind.BACKEND,
    }
    assert refused["old"].text.startswith("agent old on node node-old speaks version 0 of the throughput vector")
    assert refused["gpu"].text.startswith(
        "agent gpu on node node-gpu can reduce with nccl/cuda only, and the others need gloo"
    )
    assert "can reduce with nothing only" in refused["none"].text


@pytest.mark.parametrize(
    ("offers", "backend"),
    [
        ([("gloo",)], "gloo"),
        ([("nccl/cuda", "gloo"), ("nccl/cuda", "gloo")], "nccl/cuda"),
        ([("nccl/rocm", "gloo"), ("nccl/cuda", "gloo")], "gloo"),  # two vendors do not speak to each other
        ([("nccl/rocm", "gloo"), ("gloo",)], "gloo"),
        ([], "gloo"),
    ],
)
def test_the_group_uses_the_fastest_backend_that_all_have(offers: list[tuple[str, ...]], backend: str) -> None:
    assert common_backend(attendee(str(n), backends=names) for n, names in enumerate(offers)) == backend


def test_declared_sites_make_a_hierarchy() -> None:
    room = Room()
    for name, site in (("a", "oslo"), ("b", "oslo"), ("c", "paris")):
        room.agents[name] = Attended(attendee(name, site=site))
    assert room.pass_s(2)[-1].hierarchical
    room.agents["d"] = Attended(attendee("d"))  # a node without a site: flat, until it has one
    assert not room.pass_s(2)[-1].hierarchical


def test_a_restarted_controller_adopts_the_running_group() -> None:
    room = Room("abc")
    room.pass_s(2)
    running = room.groups.group
    again = Room()
    again.now = room.now
    again.agents = dict(room.agents)
    assert again.pass_s(3) == []
    assert (again.groups.group.epoch, again.groups.group.agents) == (running.epoch, running.agents)


def test_a_restarted_controller_that_misses_a_member_forms_a_later_epoch() -> None:
    room = Room("abc")
    room.pass_s(2)
    again = Room()
    again.now = room.now
    again.agents = {name: said for name, said in room.agents.items() if name != "b"}
    published = again.pass_s(3)
    assert [group.agents for group in published] == [("a", "c")]
    assert published[0].epoch > room.groups.group.epoch


def test_when_all_are_gone_the_next_group_has_a_later_epoch() -> None:
    room = Room("ab")
    room.pass_s(2)
    room.leave("a")
    room.leave("b")
    room.pass_s(5)
    room.agents["c"] = Attended(attendee("c"))
    group = room.pass_s(2)[-1]
    assert group.agents == ("c",)
    assert group.epoch > 1


def test_what_is_kept_of_agents_that_do_not_return_is_bounded() -> None:
    room = Room("a")
    room.pass_s(2)
    for number in range(200):
        name = f"n{number}"
        room.agents[name] = Attended(attendee(name))
        room.pass_s(0.1)
        room.leave(name)
    room.pass_s(2 * POLICY.forgive_s + POLICY.hold_max_s)
    assert set(room.groups._agents) == {"a"}
    assert room.groups._records == {}


def test_deciding_for_a_thousand_agents_is_cheap() -> None:
    import time

    room = Room()
    room.agents = {str(number): Attended(attendee(str(number))) for number in range(1000)}
    room.pass_s(3)
    assert len(room.groups.group.members) == 1000
    started = time.process_time()
    for _ in range(10):
        room.groups.poll(room.now)
    assert (time.process_time() - started) / 10 < 0.05
