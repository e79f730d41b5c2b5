"""The agent's state machine: the whole State x Event product, and what an epoch's life looks like."""

from __future__ import annotations

import itertools

import pytest

from megatoken.transitions import IllegalTransition
from megatoken.worker.throughput.decide.epochs import (
    TRANSITIONS,
    Abandon,
    Broke,
    Connect,
    Connected,
    Epochs,
    EpochState,
    Event,
    Greet,
    Greeted,
    Instruction,
    Publish,
    PublishIncomplete,
    Reduce,
    ReduceDone,
    Regrouped,
    Report,
    TickDue,
    WakeIn,
)

TICK_S, PATIENCE_S = 1.0, 3.0
REGROUPED_IN, REGROUPED_OUT = Regrouped(8, 1, 3, "lost n"), Regrouped(8, None, 3)
NOW: tuple[Event, ...] = (
    Connected(7),
    Greeted(7),
    TickDue(7),
    ReduceDone(7, False),
    ReduceDone(7, True),
    Broke(7, "why", (2,)),
)
EVENTS: tuple[Event, ...] = (REGROUPED_IN, REGROUPED_OUT, *NOW)

JOIN = [Report(8, EpochState.FORMING), Connect(8, 1, 3)]
LEAVE = [Report(8, EpochState.OUTSIDE), WakeIn(8, PATIENCE_S)]
BROKEN = [Abandon(7), Report(7, EpochState.BROKEN, "why", (2,)), WakeIn(7, PATIENCE_S)]
REPLACED = PublishIncomplete(7, 4, "epoch 8 replaced it: lost n")
WAITING = WakeIn(7, TICK_S)

# (state, event) -> (next state, instructions); what is missing is illegal. Tick 4 of epoch 7 is under way or was last.
EXPECTED: dict[tuple[EpochState, Event], tuple[EpochState, list[Instruction]]] = {
    (EpochState.OUTSIDE, REGROUPED_IN): (EpochState.FORMING, JOIN),
    (EpochState.OUTSIDE, REGROUPED_OUT): (EpochState.OUTSIDE, LEAVE),
    (EpochState.OUTSIDE, TickDue(7)): (
        EpochState.OUTSIDE,
        [PublishIncomplete(7, 5, "this agent is in no group"), WAITING],
    ),
    (EpochState.FORMING, REGROUPED_IN): (EpochState.FORMING, [Abandon(7), *JOIN]),
    (EpochState.FORMING, REGROUPED_OUT): (EpochState.OUTSIDE, [Abandon(7), *LEAVE]),
    (EpochState.FORMING, Connected(7)): (EpochState.GREETING, [Greet(7)]),
    (EpochState.FORMING, Broke(7, "why", (2,))): (EpochState.BROKEN, BROKEN),
    (EpochState.GREETING, REGROUPED_IN): (EpochState.FORMING, [Abandon(7), *JOIN]),
    (EpochState.GREETING, REGROUPED_OUT): (EpochState.OUTSIDE, [Abandon(7), *LEAVE]),
    (EpochState.GREETING, Greeted(7)): (EpochState.STANDING, [WAITING]),
    (EpochState.GREETING, Broke(7, "why", (2,))): (EpochState.BROKEN, BROKEN),
    (EpochState.STANDING, REGROUPED_IN): (EpochState.FORMING, [Abandon(7), *JOIN]),
    (EpochState.STANDING, REGROUPED_OUT): (EpochState.OUTSIDE, [Abandon(7), *LEAVE]),
    (EpochState.STANDING, TickDue(7)): (EpochState.REDUCING, [Reduce(7, 5)]),
    (EpochState.REDUCING, REGROUPED_IN): (EpochState.FORMING, [Abandon(7), REPLACED, *JOIN]),
    (EpochState.REDUCING, REGROUPED_OUT): (
        EpochState.OUTSIDE,
        [Abandon(7), PublishIncomplete(7, 4, "epoch 8 replaced it"), *LEAVE],
    ),
    (EpochState.REDUCING, ReduceDone(7, False)): (EpochState.STANDING, [Publish(7, 4), WAITING]),
    (EpochState.REDUCING, ReduceDone(7, True)): (EpochState.GREETING, [Publish(7, 4), Greet(7)]),
    (EpochState.REDUCING, Broke(7, "why", (2,))): (
        EpochState.BROKEN,
        [BROKEN[0], PublishIncomplete(7, 4, "why"), *BROKEN[1:]],
    ),
    (EpochState.BROKEN, REGROUPED_IN): (EpochState.FORMING, [Abandon(7), *JOIN]),
    (EpochState.BROKEN, REGROUPED_OUT): (EpochState.OUTSIDE, [Abandon(7), *LEAVE]),
    (EpochState.BROKEN, TickDue(7)): (
        EpochState.BROKEN,
        [PublishIncomplete(7, 5, "the group broke and no new one came"), WAITING],
    ),
}


def machine(state: EpochState) -> Epochs:
    return Epochs(TICK_S, PATIENCE_S, state, epoch=7, tick=4)


@pytest.mark.parametrize(("state", "event"), list(itertools.product(EpochState, EVENTS)))
def test_every_event_in_every_state(state: EpochState, event: Event) -> None:
    epochs = machine(state)
    expected = EXPECTED.get((state, event))
    if expected is None:
        with pytest.raises(IllegalTransition, match=state.value):
            epochs.handle(event)
        assert epochs.state is state
        return
    assert epochs.handle(event) == expected[1]
    assert epochs.state is expected[0]


def test_the_expected_table_and_the_machine_name_the_same_pairs() -> None:
    legal = {(state, event) for state in EpochState for event in EVENTS if type(event) in TRANSITIONS[state]}
    assert legal == set(EXPECTED)


@pytest.mark.parametrize("state", EpochState)
def test_events_of_an_earlier_epoch_change_nothing(state: EpochState) -> None:
    epochs = machine(state)
    late: tuple[Event, ...] = (Connected(6), Greeted(6), TickDue(6), ReduceDone(6, True), Broke(6, "late"))
    for event in (*late, Regrouped(7, 0, 1), Regrouped(3, 0, 1)):
        assert epochs.handle(event) == []
    assert (epochs.state, epochs.epoch, epochs.tick) == (state, 7, 4)


def test_a_later_epoch_is_entered_by_regrouping_only() -> None:
    with pytest.raises(IllegalTransition):
        machine(EpochState.STANDING).handle(TickDue(9))


def test_the_first_tick_of_an_epoch_comes_at_once_and_is_numbered_one() -> None:
    epochs = Epochs(TICK_S)
    epochs.handle(Regrouped(1, 0, 2))
    epochs.handle(Connected(1))
    assert epochs.handle(Greeted(1)) == [Report(1, EpochState.STANDING), WakeIn(1, 0.0)]
    assert epochs.handle(TickDue(1)) == [Reduce(1, 1)]
    assert epochs.handle(ReduceDone(1, False)) == [Publish(1, 1), WakeIn(1, TICK_S)]


def test_a_fault_costs_one_incomplete_sample() -> None:
    epochs = machine(EpochState.REDUCING)
    done = epochs.handle(Broke(7, "peer lost"))
    done += epochs.handle(Regrouped(8, 0, 2))
    done += epochs.handle(Connected(8))
    done += epochs.handle(Greeted(8))
    done += epochs.handle(TickDue(8))
    done += epochs.handle(ReduceDone(8, False))
    assert [step for step in done if isinstance(step, PublishIncomplete)] == [PublishIncomplete(7, 4, "peer lost")]
    assert [step for step in done if isinstance(step, Publish)] == [Publish(8, 1)]


def test_the_history_in_an_error_is_bounded() -> None:
    epochs = machine(EpochState.STANDING)
    for _ in range(50):
        epochs.handle(TickDue(7))
        epochs.handle(ReduceDone(7, False))
    assert len(epochs.history) == 8
    with pytest.raises(IllegalTransition, match="reducing:ReduceDone"):
        epochs.handle(Connected(7))
