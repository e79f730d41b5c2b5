"""When an agent reduces and with whom: a state machine that knows no network, clock or torch.

    OUTSIDE --Regrouped--> FORMING --Connected--> GREETING --Greeted--> STANDING --TickDue--> REDUCING
                                                      ^                    ^                     |
                                                      +---- news ----------+------ Reduced ------+
    any of FORMING, GREETING, REDUCING --Broke--> BROKEN;  any state --Regrouped--> FORMING or OUTSIDE

One door in, `handle(event)`; instructions out, in order. Every event of an epoch carries its number, and one of an
earlier epoch is ignored: an abandoned reducer may still answer. A fault costs one incomplete sample: the one whose
reduction it broke. Only when no new epoch comes for `patience_s` does each further tick say so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from megatoken.transitions import IllegalTransition


class EpochState(StrEnum):
    """Where an agent stands in its epoch."""

    OUTSIDE = "outside"  # in no group
    FORMING = "forming"  # connecting
    GREETING = "greeting"  # telling each other what they count
    STANDING = "standing"  # between two reductions
    REDUCING = "reducing"
    BROKEN = "broken"  # the group failed; waits for the next epoch


# Events.
@dataclass(frozen=True, slots=True)
class Regrouped:
    """The controller published a group; rank is None when this agent is not in it."""

    epoch: int
    rank: int | None
    size: int
    why: str = ""


@dataclass(frozen=True, slots=True)
class Connected:
    epoch: int


@dataclass(frozen=True, slots=True)
class Greeted:
    epoch: int


@dataclass(frozen=True, slots=True)
class TickDue:
    epoch: int


@dataclass(frozen=True, slots=True)
class ReduceDone:
    """A reduction ended; `news`: a rank has models or replicas that the layout has not."""

    epoch: int
    news: bool


@dataclass(frozen=True, slots=True)
class Broke:
    """The group failed. `suspects` are ranks."""

    epoch: int
    reason: str
    suspects: tuple[int, ...] = ()


Event = Regrouped | Connected | Greeted | TickDue | ReduceDone | Broke


# Instructions.
@dataclass(frozen=True, slots=True)
class Abandon:
    """Kill the reducer of this epoch."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Connect:
    """Start a reducer and connect it as `rank` of `size`; answer Connected or Broke."""

    epoch: int
    rank: int
    size: int


@dataclass(frozen=True, slots=True)
class Greet:
    """Exchange greetings; answer Greeted or Broke."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Reduce:
    """Sum; answer Reduced or Broke."""

    epoch: int
    tick: int


@dataclass(frozen=True, slots=True)
class WakeIn:
    """Send TickDue after `seconds`; replaces an earlier one."""

    epoch: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Publish:
    """A tick's sample is whole."""

    epoch: int
    tick: int


@dataclass(frozen=True, slots=True)
class PublishIncomplete:
    """A tick has no sum: the last known totals, marked."""

    epoch: int
    tick: int
    reason: str


@dataclass(frozen=True, slots=True)
class Report:
    """Tell the controller at once how this agent stands."""

    epoch: int
    state: EpochState
    problem: str = ""
    suspects: tuple[int, ...] = ()


Instruction = Abandon | Connect | Greet | Reduce | WakeIn | Publish | PublishIncomplete | Report
Handler = Callable[["Epochs", "Event"], list[Instruction]]


@dataclass(slots=True)
class Epochs:
    """The state of one agent."""

    tick_s: float
    patience_s: float = 3.0
    state: EpochState = EpochState.OUTSIDE
    epoch: int = 0
    tick: int = 0
    history: list[str] = field(default_factory=list)

    def handle(self, event: Event) -> list[Instruction]:
        """Takes one event; returns what to do, in order. Raises IllegalTransition."""
        if event.epoch < self.epoch or (isinstance(event, Regrouped) and event.epoch == self.epoch):
            return []
        handler = TRANSITIONS[self.state].get(type(event))
        if handler is None or (event.epoch > self.epoch and not isinstance(event, Regrouped)):
            raise IllegalTransition(
                f"{event} in {self.state} of epoch {self.epoch}; before it: {', '.join(self.history)}"
            )
        self.history.append(f"{self.state}:{type(event).__name__}")
        del self.history[:-8]
        return handler(self, event)

    def _regroup(self, event: Event) -> list[Instruction]:
        done: list[Instruction] = []
        if not isinstance(event, Regrouped):
            raise IllegalTransition(str(event))
        if self.state is not EpochState.OUTSIDE:
            done.append(Abandon(self.epoch))
        if self.state is EpochState.REDUCING:
            why = f"epoch {event.epoch} replaced it" + (f": {event.why}" if event.why else "")
            done.append(PublishIncomplete(self.epoch, self.tick, why))
        self.epoch, self.tick = event.epoch, 0
        if event.rank is None:
            self.state = EpochState.OUTSIDE
            return [*done, Report(self.epoch, self.state), WakeIn(self.epoch, self.patience_s)]
        self.state = EpochState.FORMING
        return [*done, Report(self.epoch, self.state), Connect(self.epoch, event.rank, event.size)]

    def _connected(self, _: Event) -> list[Instruction]:
        self.state = EpochState.GREETING
        return [Greet(self.epoch)]

    def _greeted(self, _: Event) -> list[Instruction]:
        self.state = EpochState.STANDING
        # The first tick comes at once, and ends for all at the same moment: from then on the ranks' clocks agree.
        if self.tick == 0:
            return [Report(self.epoch, self.state), WakeIn(self.epoch, 0.0)]
        return [WakeIn(self.epoch, self.tick_s)]

    def _tick(self, _: Event) -> list[Instruction]:
        self.state = EpochState.REDUCING
        self.tick += 1
        return [Reduce(self.epoch, self.tick)]

    def _reduced(self, event: Event) -> list[Instruction]:
        if isinstance(event, ReduceDone) and event.news:
            self.state = EpochState.GREETING
            return [Publish(self.epoch, self.tick), Greet(self.epoch)]
        self.state = EpochState.STANDING
        return [Publish(self.epoch, self.tick), WakeIn(self.epoch, self.tick_s)]

    def _broke(self, event: Event) -> list[Instruction]:
        if not isinstance(event, Broke):
            raise IllegalTransition(str(event))
        done: list[Instruction] = [Abandon(self.epoch)]
        if self.state is EpochState.REDUCING:
            done.append(PublishIncomplete(self.epoch, self.tick, event.reason))
        self.state = EpochState.BROKEN
        report = Report(self.epoch, self.state, event.reason, event.suspects)
        return [*done, report, WakeIn(self.epoch, self.patience_s)]

    def _still_waiting(self, _: Event) -> list[Instruction]:
        self.tick += 1
        why = "this agent is in no group" if self.state is EpochState.OUTSIDE else "the group broke and no new one came"
        return [PublishIncomplete(self.epoch, self.tick, why), WakeIn(self.epoch, self.tick_s)]


_WAITING: dict[type, Handler] = {Regrouped: Epochs._regroup, TickDue: Epochs._still_waiting}
_WORKING: dict[type, Handler] = {Regrouped: Epochs._regroup, Broke: Epochs._broke}
TRANSITIONS: dict[EpochState, dict[type, Handler]] = {
    EpochState.OUTSIDE: _WAITING,
    EpochState.FORMING: {**_WORKING, Connected: Epochs._connected},
    EpochState.GREETING: {**_WORKING, Greeted: Epochs._greeted},
    EpochState.STANDING: {Regrouped: Epochs._regroup, TickDue: Epochs._tick},
    EpochState.REDUCING: {**_WORKING, ReduceDone: Epochs._reduced},
    EpochState.BROKEN: _WAITING,
}
