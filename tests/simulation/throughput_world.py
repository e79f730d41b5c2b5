"""A deterministic world for the throughput collective: virtual clock, simulated network, the shipped decisions.

Agents run the real Epochs, Ledger, Layout and Books, the controller the real Groups. Simulated are processes (killed,
frozen, started late), links (between agents, and from an agent to the controller), the reduction itself (whole when
every member takes part and can reach every other, else an error or a timeout), and workers that count. Everything that
happens follows from one seed.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatoken.counters import INDEX
from megatoken.worker.throughput.decide import epochs as e
from megatoken.worker.throughput.decide.group import Attended, Attendee, Group, GroupPolicy, Groups, Stance
from megatoken.worker.throughput.decide.layout import Greeting, Layout, greeting_of
from megatoken.worker.throughput.decide.ledger import WIDTH, NodeLedger, Totals, Writer
from megatoken.worker.throughput.decide.rates import ClusterRates

TICK_S, DEADLINE_S, FORM_S, ATTEND_S, POLL_S = 1.0, 1.0, 2.0, 0.5, 0.1
GENERATED = INDEX["generated_tokens"]
STANCES = {
    e.EpochState.OUTSIDE: Stance.OUTSIDE,
    e.EpochState.FORMING: Stance.FORMING,
    e.EpochState.GREETING: Stance.FORMING,
    e.EpochState.STANDING: Stance.TICKING,
    e.EpochState.REDUCING: Stance.TICKING,
    e.EpochState.BROKEN: Stance.FAILED,
}


class Violation(AssertionError):
    """A property that must always hold did not. Carries the seed and the time."""


@dataclass
class Node:
    """What survives an agent: the counter files."""

    name: str
    workers: dict[tuple[str, int], Totals] = field(default_factory=dict)

    def count(self, rng: random.Random) -> None:
        for totals in self.workers.values():
            totals[GENERATED] += rng.randrange(200)
            totals[INDEX["prompt_tokens"]] += rng.randrange(50)

    def readings(self) -> list[tuple[Writer, Totals]]:
        return [(Writer("worker", name, inc, "m"), totals.copy()) for (name, inc), totals in self.workers.items()]

    def generated(self) -> int:
        return sum(int(totals[GENERATED]) for totals in self.workers.values())


@dataclass
class Meeting:
    """One collective operation: who has come to it, and with what."""

    payloads: dict[str, Any] = field(default_factory=dict)
    over: bool = False


class SimAgent:
    """One agent process."""

    def __init__(self, world: World, name: str, node: Node) -> None:
        self.world, self.name, self.node = world, name, node
        self.epochs, self.ledger, self.rates = e.Epochs(TICK_S), NodeLedger(), ClusterRates({})
        self.own = Greeting(name, node.name, "", f"ledger-{node.name}")
        self.alive, self.frozen = True, False
        self.missed: list[Callable[[], None]] = []  # what the kernel kept while it was frozen
        self.group: Group = Group(0, ())
        self.phase = 0  # operations of this epoch so far
        self.timer = 0
        self.greeted, self.layout = self.own, Layout.of([])
        self.problem: tuple[str, ...] = ()
        self.samples: list[tuple[float, int, int, bool, str]] = []
        self.total = 0

    def do(self, action: Callable[[], None]) -> None:
        """Runs what concerns this process: later when it is frozen, never when it is dead."""
        if not self.alive:
            return
        if self.frozen:
            self.missed.append(action)
        else:
            action()

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        self.world.after(seconds, lambda: self.do(action))

    def take(self, event: e.Event) -> None:
        for step in self.epochs.handle(event):
            self._step(step)

    def _step(self, step: e.Instruction) -> None:
        match step:
            case e.Connect(epoch):
                self._meet(epoch, None, FORM_S, lambda _: self.take(e.Connected(epoch)))
            case e.Greet(epoch):
                self.greeted = greeting_of(self.own, self._sums(), None)
                known = self.rates.departed(Layout.of([]))
                self._meet(epoch, (self.greeted, known), FORM_S, lambda met: self._met(epoch, met))
            case e.Reduce(epoch):
                sums = self._sums()
                news = greeting_of(self.own, sums, None) != self.greeted
                rank = self.group.agents.index(self.name)
                vector = self.layout.encode(rank, sums, news)
                self._meet(epoch, vector, DEADLINE_S, lambda met: self._summed(epoch, met))
            case e.WakeIn(epoch, seconds):
                self.timer += 1
                timer = self.timer
                self.after(seconds, lambda: self.take(e.TickDue(epoch)) if timer == self.timer else None)
            case e.Abandon():
                self.timer += 1
            case e.Publish(epoch, tick):
                self.samples.append((self.world.now, epoch, tick, True, ""))
                self.world.check_sample(self, epoch, tick)
            case e.PublishIncomplete(epoch, tick, reason):
                self.samples.append((self.world.now, epoch, tick, False, reason))
            case e.Report(_, _, _, suspects):
                self.problem = tuple(self.group.agents[rank] for rank in suspects)
                self.attend()

    def _sums(self) -> Any:
        self.ledger.record(self.node.readings(), self.world.now)
        return self.ledger.sums(self.world.now, None)

    def _meet(self, epoch: int, payload: Any, timeout_s: float, then: Callable[[dict[str, Any]], None]) -> None:
        self.phase += 1
        self.world.meet(self, epoch, self.phase, payload, timeout_s, then)

    def _met(self, epoch: int, met: dict[str, Any]) -> None:
        greetings = [met[agent][0] for agent in self.group.agents]
        self.layout = Layout.of(greetings)
        present = {greeting.ledger for greeting in greetings}
        for _, known in met.values():
            self.rates.learn([item for item in known if item[0].ledger not in present], self.world.now)
        self.rates.arrange(self.layout)
        self.take(e.Greeted(epoch))

    def _summed(self, epoch: int, met: dict[str, Any]) -> None:
        vector = np.sum([met[agent] for agent in self.group.agents], axis=0)
        cells, news = self.layout.decode(vector)
        self.rates.update(cells, self.world.now)
        self.take(e.ReduceDone(epoch, news > 0))

    def broke(self, epoch: int, reason: str) -> None:
        suspects = tuple(
            rank
            for rank, agent in enumerate(self.group.agents)
            if agent != self.name and not self.world.reaches(self.name, agent, kernel=True)
        )
        self.take(e.Broke(epoch, reason, suspects))

    def enter(self, group: Group) -> None:
        if group.epoch <= self.epochs.epoch:
            return
        self.group, self.phase = group, 0
        rank = group.agents.index(self.name) if self.name in group.agents else None
        self.take(e.Regrouped(group.epoch, rank, len(group.agents), group.why))

    def attend(self) -> None:
        members = self.group.agents if self.group.agents[:1] == (self.name,) else ()
        if self.epochs.state is e.EpochState.OUTSIDE:
            self.problem = tuple(a for a in self.group.agents if not self.world.reaches(self.name, a, kernel=True))
        said = Attended(
            Attendee(self.name, self.node.name, "", self.name, self.name),
            self.epochs.epoch,
            STANCES[self.epochs.state],
            "",
            self.problem,
            members,
        )
        self.world.to_controller(self, said)


class World:
    """Everything, from one seed."""

    def __init__(self, seed: int, policy: GroupPolicy | None = None) -> None:
        self.rng, self.seed, self.now = random.Random(seed), seed, 0.0
        self._policy = policy or GroupPolicy()
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self.nodes: dict[str, Node] = {}
        self.agents: dict[str, SimAgent] = {}
        self.cut: set[frozenset[str]] = set()  # pairs of agents; (agent, "controller")
        self.meetings: dict[tuple[int, int], Meeting] = {}
        self.sums: dict[tuple[int, int], int] = {}
        self.groups, self.controller_up = Groups(self._policy), True
        self.latest = Group(0, ())
        self.published: list[tuple[float, Group]] = []
        self._names = itertools.count()
        self._every(POLL_S, self._poll)
        self._every(0.25, lambda: [node.count(self.rng) for node in self.nodes.values()])

    # Time.

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (self.now + seconds, next(self._order), action))

    def _every(self, seconds: float, action: Callable[[], Any]) -> None:
        def again() -> None:
            action()
            self.after(seconds, again)

        self.after(self.rng.random() * seconds, again)

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self._queue and self._queue[0][0] <= end:
            self.now, _, action = heapq.heappop(self._queue)
            action()
        self.now = end

    def latency(self) -> float:
        return 0.0005 + 0.003 * self.rng.random()

    # Faults.

    def start(self, node: str) -> SimAgent:
        made = self.nodes.setdefault(node, Node(node, {(f"{node}-r0", 1): np.zeros(WIDTH, np.int64)}))
        agent = SimAgent(self, f"{node}.{next(self._names)}", made)
        self.agents[agent.name] = agent

        def attend_for_life() -> None:
            if agent.alive:
                agent.do(agent.attend)
                self.after(ATTEND_S, attend_for_life)

        self.after(self.latency(), attend_for_life)
        return agent

    def kill(self, agent: SimAgent) -> None:
        agent.alive = False
        del self.agents[agent.name]
        if self.hears(agent.name):
            self.after(self.latency(), lambda: self.groups.left(agent.name, self.now))
            self.after(2 * self.latency(), self._poll)
        for (epoch, _), meeting in list(self.meetings.items()):
            if agent.name in meeting.payloads and not meeting.over:
                self._fail(meeting, epoch, "peer_lost")

    def freeze(self, agent: SimAgent) -> None:
        agent.frozen = True

    def thaw(self, agent: SimAgent) -> None:
        agent.frozen = False
        missed, agent.missed = agent.missed, []
        for action in missed:
            agent.do(action)
        if self.hears(agent.name):
            self._deliver(agent)

    def cut_link(self, one: str, other: str) -> None:
        self.cut.add(frozenset((one, other)))

    def mend(self, one: str, other: str) -> None:
        self.cut.discard(frozenset((one, other)))
        for name in (one, other):
            if name in self.agents and self.hears(name):
                self._deliver(self.agents[name])

    def restart_controller(self, away_s: float) -> None:
        """It forgets everything but what was published, as a controller does whose process was replaced."""
        self.controller_up = False
        self.groups = Groups(self._policy, last_epoch=self.latest.epoch)

        def back() -> None:
            self.controller_up = True

        self.after(away_s, back)

    def restart_worker(self, node: Node) -> None:
        name, incarnation = max(node.workers, key=lambda key: key[1])
        node.workers[name, incarnation + 1] = np.zeros(WIDTH, np.int64)

    def heal(self) -> None:
        self.cut.clear()
        for agent in list(self.agents.values()):
            if agent.frozen:
                self.thaw(agent)
        with_agent = {agent.node.name for agent in self.agents.values()}
        for name in self.nodes:
            if name not in with_agent:
                self.start(name)

    # Network.

    def hears(self, agent: str) -> bool:
        return self.controller_up and frozenset((agent, "controller")) not in self.cut

    def reaches(self, one: str, other: str, kernel: bool = False) -> bool:
        """Whether `other` answers `one`; with `kernel`, whether its machine does (a frozen process' does)."""
        there = self.agents.get(other)
        up = there is not None and there.alive and (kernel or not there.frozen)
        return up and frozenset((one, other)) not in self.cut

    def to_controller(self, agent: SimAgent, said: Attended) -> None:
        if not self.hears(agent.name):
            return

        def arrive() -> None:
            if self.hears(agent.name) and agent.alive:
                before = self.groups.group
                self.groups.attended(said, self.now)
                if said.state in (Stance.FAILED, Stance.FORMING):
                    self._poll()
                if said.epoch < before.epoch:
                    self._deliver(agent)

        self.after(self.latency(), arrive)

    def _poll(self) -> None:
        if not self.controller_up:
            return
        group = self.groups.poll(self.now)
        if group is None:
            return
        if group.epoch <= self.latest.epoch:
            raise Violation(f"seed {self.seed}, {self.now:.3f} s: epoch {group.epoch} after {self.latest.epoch}")
        self.published.append((self.now, group))
        self.latest = group
        for agent in list(self.agents.values()):
            if self.hears(agent.name):
                self._deliver(agent)

    def _deliver(self, agent: SimAgent) -> None:
        group = self.latest
        if group.epoch:
            agent.after(self.latency(), lambda: agent.enter(group))

    def meet(
        self,
        agent: SimAgent,
        epoch: int,
        phase: int,
        payload: Any,
        timeout_s: float,
        then: Callable[[dict[str, Any]], None],
    ) -> None:
        """Joins an operation; `then` gets everyone's payload when all came in time."""
        members = agent.group.agents
        meeting = self.meetings.setdefault((epoch, phase), Meeting())
        if meeting.over or any(name not in self.agents for name in members):
            agent.after(self.latency(), lambda: self._broke(agent, epoch, phase, "peer_lost"))
            return
        meeting.payloads[agent.name] = (payload, then, agent)
        agent.after(timeout_s, lambda: None if meeting.over else self._fail(meeting, epoch, "timeout"))
        if len(meeting.payloads) == len(members) and all(
            self.reaches(one, other) for one, other in itertools.permutations(members, 2)
        ):
            meeting.over = True
            payloads = {name: content for name, (content, _, _) in meeting.payloads.items()}
            took = self.latency()
            for _, finish, member in meeting.payloads.values():
                self._finish(member, epoch, phase, took, finish, payloads)

    def _finish(self, member: SimAgent, epoch: int, phase: int, took: float, then: Any, payloads: Any) -> None:
        def end() -> None:
            if (member.epochs.epoch, member.phase) == (epoch, phase):
                then(payloads)

        member.after(took, end)

    def _fail(self, meeting: Meeting, epoch: int, reason: str) -> None:
        meeting.over = True
        for _, _, member in meeting.payloads.values():
            member.after(self.latency(), lambda member=member: self._broke(member, epoch, member.phase, reason))

    def _broke(self, agent: SimAgent, epoch: int, phase: int, reason: str) -> None:
        working = agent.epochs.state in (e.EpochState.FORMING, e.EpochState.GREETING, e.EpochState.REDUCING)
        if (agent.epochs.epoch, agent.phase) == (epoch, phase) and working:
            agent.broke(epoch, reason)

    # Properties.

    def check_sample(self, agent: SimAgent, epoch: int, tick: int) -> None:
        """Held at every complete sample of every agent."""
        where = f"seed {self.seed}, {self.now:.3f} s, {agent.name}, epoch {epoch} tick {tick}"
        total = int(agent.rates.cluster().workers[GENERATED])
        truth = sum(node.generated() for node in self.nodes.values())
        if total > truth:
            raise Violation(f"{where}: {total} tokens, but only {truth} were made")
        if total < agent.total:
            raise Violation(f"{where}: the total went back from {agent.total} to {total}")
        if self.sums.setdefault((epoch, tick), total) != total:
            raise Violation(f"{where}: {total} here, {self.sums[epoch, tick]} at another rank")
        agent.total = total

    def at_rest(self) -> bool:
        """Every agent has a complete sample of the last tick's time, in one group of all nodes, with the exact sum."""
        truth = sum(node.generated() for node in self.nodes.values())
        return all(
            agent.samples
            and agent.samples[-1][3]
            and self.now - agent.samples[-1][0] < 1.5 * TICK_S
            and len(agent.group.agents) == len(self.nodes)
            and agent.total == truth
            for agent in self.agents.values()
        )
