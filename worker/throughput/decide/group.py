"""Who is in the next epoch: the controller's half of the collective, without network or clock.

Decides from attendance alone. Every agent keeps a stream open to the controller and says several times a second how it
stands. The rules, in order of urgency:
  1. A member whose stream ended, or that was silent for `silence_s`, is dropped at once.
  2. Members that report a failed group get a new epoch once all of them did, or `settle_s` after the first. Those that
     others could not reach are left out: as few as explain every report.
  3. Agents that wait outside join together, `gather_s` after the last one came, and not while a group still forms.
     One that says it cannot reach a member (a link is cut) waits until it can.
An agent that was dropped is held out for `hold_s`, twice as long each time up to `hold_max_s`, counted per node: a
flapping node costs the others ever fewer samples. An agent that cannot be in the group (another version of the vector,
no common backend, a second agent on a node) is refused with a reason.

A controller that restarted adopts the group its agents still have, if all its members attend: nothing stops for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from megatoken.backoff import doubling_pause_s
from megatoken.worker.throughput.decide.layout import WIRE_VERSION


class Stance(StrEnum):
    """How an agent says it stands in its epoch."""

    OUTSIDE = "outside"
    FORMING = "forming"
    TICKING = "ticking"
    FAILED = "failed"


class RefusalKind(StrEnum):
    """Why an agent is kept out of every group."""

    WIRE_VERSION = "version"
    REPLACED = "replaced"
    BACKEND = "backend"


@dataclass(frozen=True, slots=True)
class Refused:
    """An agent that is kept out. `text` is for a person."""

    kind: RefusalKind
    text: str


@dataclass(frozen=True, slots=True)
class GroupPolicy:
    """The times by which `Groups` decides, in seconds."""

    silence_s: float = 1.5
    settle_s: float = 0.3
    gather_s: float = 0.3
    gather_max_s: float = 1.0
    form_s: float = 3.0  # a group that has not formed by then is not waited for: an agent's limit, and a little
    nccl_form_s: float = 32.0  # the same where a device is first made ready
    hold_s: float = 0.5
    hold_max_s: float = 60.0
    forgive_s: float = 60.0  # without trouble for this long: a clean record
    adopt_s: float = 1.0  # how long a new controller waits for the members of a group that it might adopt


@dataclass(frozen=True, slots=True)
class Attendee:
    """An agent as it describes itself."""

    agent: str
    node: str
    site: str
    address: str
    store_address: str
    backends: tuple[str, ...] = ("gloo",)
    wire_version: int = WIRE_VERSION


@dataclass(frozen=True, slots=True)
class Attended:
    """One sign of life."""

    attendee: Attendee
    epoch: int = 0
    state: Stance = Stance.OUTSIDE
    problem: str = ""
    suspects: tuple[str, ...] = ()  # agents of the group that did not answer this one
    members: tuple[str, ...] = ()  # agents of `epoch`, in rank order


@dataclass(frozen=True, slots=True)
class Group:
    """The members of one epoch in rank order. Rank 0 serves the rendezvous store."""

    epoch: int
    members: tuple[Attendee, ...]
    backend: str = "gloo"
    hierarchical: bool = False
    why: str = ""

    @property
    def agents(self) -> tuple[str, ...]:
        """Ids in rank order."""
        return tuple(member.agent for member in self.members)


@dataclass(slots=True)
class _Present:
    said: Attended
    first_s: float
    last_s: float
    gone: bool = False


@dataclass(slots=True)
class _Record:
    """A node's troubles."""

    strikes: int = 0
    struck_s: float = 0.0
    held_until_s: float = float("-inf")


@dataclass(slots=True)
class Groups:
    """Who attends, who is in the group, and what must change. `now` is monotonic seconds throughout."""

    policy: GroupPolicy = field(default_factory=GroupPolicy)
    group: Group = field(default_factory=lambda: Group(0, ()))
    last_epoch: int = 0  # of an earlier controller, where it is known: an agent out of sight may still be in it
    _agents: dict[str, _Present] = field(default_factory=dict)
    _records: dict[str, _Record] = field(default_factory=dict)
    _failed_s: float | None = None
    _formed_s: float = float("-inf")
    _started_s: float | None = None
    _polled_s: float | None = None
    _fruitless: int = 0  # epochs in a row that failed before anyone ticked
    _worked: bool = False
    _in: frozenset[str] = frozenset()  # agents of the group
    _refused: dict[str, Refused] = field(default_factory=dict)
    _changed: bool = False  # somebody came, went or changed: `_refused` is to be made again

    def attended(self, said: Attended, now: float) -> Refused | None:
        """Takes a sign of life; returns why the agent is refused, if it is."""
        agent = said.attendee.agent
        known = self._agents.get(agent)
        if known is None or known.gone:
            self._agents[agent], self._changed = _Present(said, now, now), True
        else:
            self._changed |= known.said.attendee != said.attendee
            known.said, known.last_s = said, now
        if said.epoch == self.group.epoch:
            self._worked |= said.state is Stance.TICKING
            if said.state is Stance.FAILED and self._failed_s is None and agent in self._in:
                self._failed_s = now
        return self._refused.get(agent)  # as of the last poll

    def left(self, agent: str, now: float) -> None:
        """The agent's stream ended."""
        known = self._agents.get(agent)
        if known is not None:
            known.gone, known.last_s = True, now
            self._changed = True

    def poll(self, now: float) -> Group | None:
        """The next group when there has to be one; call it about ten times a second and after every event."""
        self._forgive_own_stall(now)
        if self._started_s is None:
            self._started_s = now
        self._forget(now)
        if self.group.epoch == 0 and self._adopt(now):
            return None
        present = self._present(now)
        lost = [member for member in self.group.members if member.agent not in present]
        failed = self._must_reform(present, now)
        unreachable = self._unreachable(present) if failed else []
        for attendee in [*lost, *(present[agent].said.attendee for agent in unreachable)]:
            self._strike(attendee.node, now)
        joiners = self._joiners(present, now)
        if not (lost or failed or (joiners and self._may_join(joiners, now))):
            return None
        stays = [a for a in self.group.agents if a in present and a not in unreachable]
        members = [present[agent].said.attendee for agent in (*stays, *joiners)]
        if not members:
            return None
        if failed and not unreachable and not lost and not self._retry_due(now):
            return None
        self._fruitless = self._fruitless + 1 if failed and not self._worked else 0
        return self._publish(members, _why(lost, unreachable, joiners, self._complaint() if failed else ""), now)

    def refusals(self) -> dict[str, Refused]:
        """Agents that attend and can be in no group now, with the reason."""
        if self._changed:
            self._refused, self._changed = self._refuse(), False
        return self._refused

    def _refuse(self) -> dict[str, Refused]:
        live = {agent: known for agent, known in self._agents.items() if not known.gone}
        refused: dict[str, Refused] = {}
        newest: dict[str, str] = {}
        for agent, known in sorted(live.items(), key=lambda pair: pair[1].first_s):
            newest[known.said.attendee.node] = agent
        for agent, known in live.items():
            attendee = known.said.attendee
            if attendee.wire_version != WIRE_VERSION:
                refused[agent] = Refused(
                    RefusalKind.WIRE_VERSION,
                    f"agent {agent} on node {attendee.node} speaks version {attendee.wire_version} of the throughput "
                    f"vector, the controller version {WIRE_VERSION}; install the same megatoken on both",
                )
            elif newest[attendee.node] != agent:
                text = f"node {attendee.node} has a newer agent, {newest[attendee.node]}"
                refused[agent] = Refused(RefusalKind.REPLACED, text)
        rest = {agent: known.said.attendee for agent, known in live.items() if agent not in refused}
        backend = common_backend(rest.values())
        for agent, attendee in rest.items():
            if backend not in attendee.backends:
                has = ", ".join(attendee.backends) or "nothing"
                refused[agent] = Refused(
                    RefusalKind.BACKEND,
                    f"agent {agent} on node {attendee.node} can reduce with {has} only, and the others need {backend}; "
                    "set its backend to auto",
                )
        return refused

    def held(self, now: float) -> dict[str, float]:
        """Nodes kept out for their troubles, and for how many seconds more."""
        return {node: record.held_until_s - now for node, record in self._records.items() if record.held_until_s > now}

    def _publish(self, members: list[Attendee], why: str, now: float) -> Group:
        backend = common_backend(members)
        sites = {member.site for member in members}
        seen = [known.said.epoch for known in self._agents.values()]
        epoch = max([self.group.epoch, self.last_epoch, *seen]) + 1
        hierarchical = len(sites) > 1 and "" not in sites
        self.group = Group(epoch, tuple(members), backend.partition("/")[0], hierarchical, why)
        self._in = frozenset(self.group.agents)
        self._failed_s, self._formed_s, self._worked = None, now, False
        return self.group

    def _present(self, now: float) -> dict[str, _Present]:
        refused = self.refusals()
        return {
            agent: known
            for agent, known in self._agents.items()
            if not known.gone and now - known.last_s < self.policy.silence_s and agent not in refused
        }

    def _must_reform(self, present: dict[str, _Present], now: float) -> bool:
        """Whether members report a failed group, and all who can have said so."""
        if self._failed_s is None:
            return False
        members = [present[agent] for agent in self.group.agents if agent in present]
        here = [known for known in members if known.said.epoch == self.group.epoch]
        everyone = len(here) == len(members) and all(known.said.state is Stance.FAILED for known in here)
        return everyone or now - self._failed_s >= self.policy.settle_s

    def _unreachable(self, present: dict[str, _Present]) -> list[str]:
        """The fewest members, greedily, without whom no report of an unreachable peer remains."""
        agents = [agent for agent in self.group.agents if agent in present]
        edges = {
            (agent, suspect)
            for agent in agents
            if present[agent].said.state is Stance.FAILED and present[agent].said.epoch == self.group.epoch
            for suspect in present[agent].said.suspects
            if suspect in agents
        }
        chosen: list[str] = []
        while edges:
            # By accusers, then by accusations: whom all accuse goes before the one that accuses all. Later ranks first.
            count = Counter(dict.fromkeys(agents, 0))
            count.update(suspect for _, suspect in edges)
            worst = max(agents, key=lambda agent: (count[agent], agents.index(agent)))
            chosen.append(worst)
            edges = {edge for edge in edges if worst not in edge}
        return chosen if len(chosen) < len(agents) else []

    def _complaint(self) -> str:
        """What the first member that reports a failure says of it."""
        members = [self._agents[agent].said for agent in self.group.agents if agent in self._agents]
        failed = [said for said in members if said.state is Stance.FAILED and said.epoch == self.group.epoch]
        return (failed[0].problem if failed else "") or "no reason given"

    def _retry_due(self, now: float) -> bool:
        """A group that keeps failing with nobody to blame is tried again ever more rarely."""
        if self._fruitless < 2:
            return True
        wait_s = doubling_pause_s(self._fruitless - 1, self.policy.hold_s, self.policy.hold_max_s)
        return now - self._formed_s >= wait_s

    def _joiners(self, present: dict[str, _Present], now: float) -> list[str]:
        """Agents outside that may come in, in the order they came. One that cannot reach a member waits."""
        members = self._in.intersection(present)
        outside = [
            agent for agent in present if agent not in self._in and members.isdisjoint(present[agent].said.suspects)
        ]
        return sorted(
            (agent for agent in outside if not self._is_held(present[agent].said.attendee.node, now)),
            key=lambda agent: (present[agent].first_s, agent),
        )

    def _may_join(self, joiners: list[str], now: float) -> bool:
        members = [self._agents[agent].said for agent in self.group.agents if agent in self._agents]
        settled = all(s.epoch == self.group.epoch and s.state is Stance.TICKING for s in members)
        nccl = self.group.backend.startswith("nccl")
        if not settled and now - self._formed_s < (self.policy.nccl_form_s if nccl else self.policy.form_s):
            return False
        came = [self._agents[agent].first_s for agent in joiners]
        return now - max(came) >= self.policy.gather_s or now - min(came) >= self.policy.gather_max_s

    def _is_held(self, node: str, now: float) -> bool:
        record = self._records.get(node)
        return record is not None and now < record.held_until_s

    def _strike(self, node: str, now: float) -> None:
        record = self._records.setdefault(node, _Record())
        if now - record.struck_s > self.policy.forgive_s:
            record.strikes = 0
        record.strikes += 1
        hold_s = doubling_pause_s(record.strikes, self.policy.hold_s, self.policy.hold_max_s)
        record.struck_s, record.held_until_s = now, now + hold_s

    def _forgive_own_stall(self, now: float) -> None:
        """When this process itself stood still, the agents' silence is not theirs."""
        if self._polled_s is not None and now - self._polled_s > self.policy.silence_s / 3:
            for known in self._agents.values():
                if not known.gone:
                    known.last_s = now
        self._polled_s = now

    def _forget(self, now: float) -> None:
        """Bounds what is kept of agents and nodes that do not come back."""
        for agent, known in list(self._agents.items()):
            if now - known.last_s > self.policy.forgive_s and agent not in self._in:
                del self._agents[agent]
                self._changed = True
        for node, record in list(self._records.items()):
            if now - max(record.struck_s, record.held_until_s) > self.policy.forgive_s:
                del self._records[node]

    def _adopt(self, now: float) -> bool:
        """Takes over a group of an earlier controller; true while it is worth waiting for its members."""
        running = [known.said for known in self._agents.values() if known.said.epoch and not known.gone]
        listed = [said for said in running if said.members]
        if not listed:
            return bool(running) and self._started_s is not None and now - self._started_s < self.policy.adopt_s
        best = max(listed, key=lambda said: said.epoch)
        here = {said.attendee.agent: said for said in running if said.epoch == best.epoch}
        if all(agent in here and here[agent].state is Stance.TICKING for agent in best.members):
            members = tuple(here[agent].attendee for agent in best.members)
            sites = {member.site for member in members}
            hierarchical = len(sites) > 1 and "" not in sites
            backend = common_backend(members).partition("/")[0]
            self.group = Group(best.epoch, members, backend, hierarchical, "adopted from the controller before")
            self._in, self._formed_s = frozenset(self.group.agents), now
            return False
        return self._started_s is not None and now - self._started_s < self.policy.adopt_s


def common_backend(attendees: Iterable[Attendee]) -> str:
    """The fastest backend that all can use; where none is common, the one that most can."""
    offered = [attendee.backends for attendee in attendees]
    count = Counter(name for names in offered for name in names)
    if not count:
        return "gloo"
    # nccl speaks to its own kind only: "nccl/cuda" and "nccl/rocm" are two backends.
    return max(count, key=lambda name: (count[name], name.startswith("nccl"), name == "gloo", name))


def _why(lost: list[Attendee], unreachable: list[str], joiners: list[str], complaint: str) -> str:
    parts = []
    if lost:
        parts.append("lost " + ", ".join(member.node for member in lost[:8]))
    if unreachable:
        parts.append("left out, not reached by others: " + ", ".join(unreachable[:8]))
    if complaint and not unreachable:
        parts.append(f"the group failed ({complaint})")
    if joiners:
        parts.append(f"{len(joiners)} joined")
    return "; ".join(parts)
