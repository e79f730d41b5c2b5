"""The controller's rules for groups at their bounds, with times that are exact in binary."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatoken.worker.throughput.decide.group import (
    Attended,
    Attendee,
    Group,
    GroupPolicy,
    Groups,
    Stance,
    common_backend,
)

POLICY = GroupPolicy(silence_s=1.5, settle_s=0.25, gather_s=0.25, gather_max_s=1.0, form_s=3.0, hold_s=0.5)


def attendee(name: str, site: str = "", backends: tuple[str, ...] = ("gloo",)) -> Attendee:
    return Attendee(name, f"node-{name}", site, f"{name}:1", f"{name}:2", backends)


def formed(names: str, **facts: object) -> Groups:
    """A group of one-letter agents that was published at 0.25 s and ticks."""
    groups = Groups(POLICY)
    for name in names:
        groups.attended(Attended(replace(attendee(name), **facts)), 0.0)  # type: ignore[arg-type]
    groups.poll(0.0)
    assert groups.poll(0.25) is not None
    ticking(groups, names, 0.25)
    return groups


def ticking(groups: Groups, names: str, now: float) -> None:
    for name in names:
        member = next(member for member in groups.group.members if member.agent == name)
        groups.attended(Attended(member, groups.group.epoch, Stance.TICKING), now)


def failed(groups: Groups, name: str, now: float, *suspects: str, problem: str = "") -> None:
    member = next(member for member in groups.group.members if member.agent == name)
    groups.attended(Attended(member, groups.group.epoch, Stance.FAILED, problem, suspects), now)


@pytest.mark.parametrize(("now", "joins"), [(0.125, False), (0.25, True)])
def test_agents_join_once_nobody_came_for_the_gathering_time(now: float, joins: bool) -> None:
    groups = Groups(POLICY)
    groups.attended(Attended(attendee("a")), 0.0)
    assert (groups.poll(now) is not None) is joins


@pytest.mark.parametrize(("now", "joins"), [(0.875, False), (1.0, True)])
def test_a_trickle_is_waited_for_no_longer_than_its_bound(now: float, joins: bool) -> None:
    groups = Groups(POLICY)
    for number, came in enumerate((0.0, 0.25, 0.5, 0.75, now)):
        groups.attended(Attended(attendee(f"a{number}")), came)
    assert (groups.poll(now) is not None) is joins


@pytest.mark.parametrize(("silent_s", "dropped"), [(1.25, False), (1.5, True)])
def test_a_member_is_dropped_after_the_silence_allowed(silent_s: float, dropped: bool) -> None:
    groups = formed("ab")
    now = 0.25
    while now < 0.25 + silent_s:
        assert groups.poll(now) is None
        now += 0.25
        ticking(groups, "a", now)
    group = groups.poll(now)
    assert (group is not None) is dropped
    if group is not None:
        assert (group.agents, group.why) == (("a",), "lost node-b")


@pytest.mark.parametrize(("gap_s", "forgiven"), [(0.5, False), (0.625, True)])
def test_agents_are_not_blamed_for_the_controllers_own_stall(gap_s: float, forgiven: bool) -> None:
    groups = formed("ab")
    groups.poll(0.5)
    groups.poll(1.0)
    groups.poll(1.0 + gap_s)
    ticking(groups, "a", 1.75)
    assert (groups.poll(1.75) is None) is forgiven


def test_a_stream_that_ended_is_not_brought_back_by_a_stall() -> None:
    groups = formed("ab")
    groups.left("b", 0.5)
    group = groups.poll(9.0)
    assert group is not None
    assert group.agents == ("a",)


@pytest.mark.parametrize(("after_s", "published"), [(0.125, False), (0.25, True)])
def test_a_failure_settles_before_those_who_say_nothing_are_passed_over(after_s: float, published: bool) -> None:
    groups = formed("ab")
    failed(groups, "a", 0.5, problem="timed out")
    group = groups.poll(0.5 + after_s)
    assert (group is not None) is published
    if group is not None:
        assert (group.epoch, group.agents, group.why) == (2, ("a", "b"), "the group failed (timed out)")


def test_a_failure_that_all_report_needs_no_settling() -> None:
    groups = formed("ab")
    failed(groups, "a", 0.5)
    failed(groups, "b", 0.5)
    group = groups.poll(0.5)
    assert group is not None
    assert group.why == "the group failed (no reason given)"


def test_two_members_that_accuse_each_other_lose_the_later_rank() -> None:
    groups = formed("ab")
    failed(groups, "a", 0.5, "b")
    failed(groups, "b", 0.5, "a")
    group = groups.poll(0.5)
    assert group is not None
    assert (group.agents, group.why) == (("a",), "left out, not reached by others: b")


def test_a_dropped_node_is_held_twice_as_long_each_time() -> None:
    groups = formed("ab")
    groups.left("b", 0.5)
    groups.poll(0.5)
    assert groups.held(0.5) == {"node-b": 0.5}
    assert groups.held(0.75) == {"node-b": 0.25}
    assert groups.held(1.0) == {}
    groups.attended(Attended(attendee("b")), 0.625)
    ticking(groups, "a", 0.875)
    assert groups.poll(0.875) is None
    ticking(groups, "a", 1.0)
    assert groups.poll(1.0) is not None
    groups.left("b", 1.25)
    groups.poll(1.25)
    assert groups.held(1.25) == {"node-b": 1.0}


def test_no_more_than_eight_lost_nodes_are_named() -> None:
    groups = formed("abcdefghijk")
    for name in "bcdefghijk":
        groups.left(name, 0.5)
    group = groups.poll(0.5)
    assert group is not None
    assert group.why == "lost " + ", ".join(f"node-{name}" for name in "bcdefghi")


@pytest.mark.parametrize(
    ("sites", "hierarchical"),
    [(("x", "y"), True), (("x", "x"), False), (("x", ""), False), (("", ""), False), (("x", "y", "z"), True)],
)
def test_a_group_is_hierarchical_when_every_member_has_one_of_several_sites(
    sites: tuple[str, ...], hierarchical: bool
) -> None:
    members = [attendee(f"a{number}", site, ("nccl/cuda",)) for number, site in enumerate(sites)]
    fresh, adopting = Groups(POLICY), Groups(POLICY)
    agents = tuple(member.agent for member in members)
    for member in members:
        fresh.attended(Attended(member), 0.0)
        adopting.attended(Attended(member, 7, Stance.TICKING, members=agents), 0.0)
    fresh.poll(0.25)
    assert fresh.group == Group(1, tuple(members), "nccl", hierarchical, f"{len(sites)} joined")
    assert adopting.poll(0.25) is None
    assert adopting.group == Group(7, tuple(members), "nccl", hierarchical, "adopted from the controller before")


@pytest.mark.parametrize(("waited_s", "published"), [(0.75, False), (1.0, True)])
@pytest.mark.parametrize("listed", [(), ("a", "gone")])
def test_a_group_that_might_be_adopted_is_waited_for_up_to_its_bound(
    listed: tuple[str, ...], waited_s: float, published: bool
) -> None:
    groups = Groups(POLICY)
    said = Attended(attendee("a"), 7, Stance.TICKING, members=listed)
    groups.attended(said, 16.0)
    groups.poll(16.0)
    groups.attended(said, 16.0 + waited_s)
    group = groups.poll(16.0 + waited_s)
    assert (group is not None) is published
    if group is not None:
        assert (group.epoch, group.agents) == (8, ("a",))


def test_a_second_agent_of_a_node_replaces_the_first_until_it_leaves() -> None:
    groups = Groups(POLICY)
    old, new = attendee("old"), replace(attendee("new"), node="node-old")
    groups.attended(Attended(old), 0.0)
    groups.attended(Attended(new), 0.125)
    assert {agent: refused.text for agent, refused in groups.refusals().items()} == {
        "old": "node node-old has a newer agent, new"
    }
    groups.left("new", 0.25)
    assert groups.refusals() == {}


def test_an_agent_that_changes_its_backends_is_judged_again() -> None:
    groups = Groups(POLICY)
    for name in "abc":
        groups.attended(Attended(attendee(name)), 0.0)
    assert groups.refusals() == {}
    groups.attended(Attended(attendee("c", backends=("nccl/cuda",))), 0.125)
    groups.attended(Attended(attendee("a")), 0.125)
    assert set(groups.refusals()) == {"c"}
    assert groups.attended(Attended(attendee("c", backends=("nccl/cuda",))), 0.25) == groups.refusals()["c"]


@pytest.mark.parametrize(
    ("offered", "common"),
    [
        ([], "gloo"),
        ([()], "gloo"),
        ([("gloo", "nccl/cuda"), ("nccl/cuda", "gloo")], "nccl/cuda"),
        ([("gloo", "nccl/cuda"), ("gloo",)], "gloo"),
        ([("mpi", "gloo"), ("gloo", "mpi")], "gloo"),
        ([("mpi", "ucc")], "ucc"),
        ([("nccl/cuda", "nccl/rocm")], "nccl/rocm"),
    ],
)
def test_the_fastest_backend_that_most_can_use_is_common(offered: list[tuple[str, ...]], common: str) -> None:
    assert common_backend(attendee(f"a{at}", backends=names) for at, names in enumerate(offered)) == common


def published_at(groups: Groups, until: float, ticks: frozenset[float] = frozenset()) -> list[float]:
    """When groups are published while agent a reports a failure every 1/8 s, but ticks at the given times."""
    times = []
    now = 0.375
    while now <= until:
        if now in ticks:
            ticking(groups, "a", now)
        else:
            failed(groups, "a", now)
        if groups.poll(now) is not None:
            times.append(now)
        now += 0.125
    return times


def test_a_group_that_never_ticks_is_tried_again_ever_more_rarely() -> None:
    groups = Groups(POLICY)
    groups.attended(Attended(attendee("a")), 0.0)
    groups.poll(0.25)
    assert published_at(groups, 4.0) == [0.375, 0.5, 1.0, 2.0, 4.0]


def test_a_group_that_ticked_waits_out_its_pause_once_and_begins_with_short_ones() -> None:
    groups = Groups(POLICY)
    groups.attended(Attended(attendee("a")), 0.0)
    groups.poll(0.25)
    assert published_at(groups, 2.25, frozenset({1.125})) == [0.375, 0.5, 1.0, 2.0, 2.125, 2.25]


@pytest.mark.parametrize(
    ("backend", "now", "joins"),
    [("gloo", 3.125, False), ("gloo", 3.25, True), ("nccl/cuda", 5.125, False), ("nccl/cuda", 5.25, True)],
)
def test_a_group_that_does_not_form_is_waited_for_up_to_its_backends_bound(
    backend: str, now: float, joins: bool
) -> None:
    groups = Groups(replace(POLICY, nccl_form_s=5.0))
    one, two = attendee("a", backends=(backend,)), attendee("b", backends=(backend,))
    groups.attended(Attended(one), 0.0)
    groups.poll(0.25)
    at = 0.25
    while at < now:
        at += 0.125
        groups.attended(Attended(one, 1, Stance.FORMING), at)
        groups.attended(Attended(two), at)
        group = groups.poll(at)
        assert group is None or at == now
    assert (group is not None) is joins
