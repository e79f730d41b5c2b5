"""Transcripts of the epoch machine: events in, instructions and the state out.

regrouped E rank=R size=N | regrouped E out
connected E | greeted E | tick E | reduced E [news] | broke E reason=.. [suspects=1,2]
"""

from __future__ import annotations

import dataclasses

from megatoken.transitions import IllegalTransition
from megatoken.worker.throughput.decide.epochs import (
    Broke,
    Connected,
    Epochs,
    Event,
    Greeted,
    ReduceDone,
    Regrouped,
    TickDue,
)
from tests.transcripts.transcript import Command


class EpochsScript:
    """One transcript's agent."""

    def __init__(self) -> None:
        self._epochs = Epochs(tick_s=1.0, patience_s=3.0)

    def run(self, command: Command) -> list[str]:
        try:
            instructions = self._epochs.handle(event_of(command))
        except IllegalTransition as error:
            return [f"illegal: {error}"]
        lines = [f"=> {told(instruction)}" for instruction in instructions]
        return [*lines, f"{self._epochs.state} in epoch {self._epochs.epoch}, tick {self._epochs.tick}"]


def event_of(command: Command) -> Event:
    """The event that a command stands for."""
    epoch = int(command.words[0])
    match command.name:
        case "regrouped":
            if "out" in command.words:
                return Regrouped(epoch, None, 0, command.options.get("why", ""))
            rank, size = int(command.number("rank")), int(command.number("size"))
            return Regrouped(epoch, rank, size, command.options.get("why", ""))
        case "connected":
            return Connected(epoch)
        case "greeted":
            return Greeted(epoch)
        case "tick":
            return TickDue(epoch)
        case "reduced":
            return ReduceDone(epoch, news="news" in command.words)
        case "broke":
            suspects = tuple(int(rank) for rank in command.options.get("suspects", "").split(",") if rank)
            return Broke(epoch, command.options.get("reason", ""), suspects)
    raise ValueError(f"no such event: {command.name}")


def told(instruction: object) -> str:
    """`Connect rank=0 size=2`: what is not the epoch, which the state line has."""
    assert dataclasses.is_dataclass(instruction)
    fields = {field.name: getattr(instruction, field.name) for field in dataclasses.fields(instruction)}
    shown = [f"{name}={value}" for name, value in fields.items() if name != "epoch" and value not in ("", ())]
    return " ".join([type(instruction).__name__, *shown])
