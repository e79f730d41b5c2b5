"""A state machine as a table: what it prints, and what an error says that finds a hole in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Generic, TypeVar

S = TypeVar("S", bound=StrEnum)
E = TypeVar("E", bound=StrEnum)


class IllegalTransition(RuntimeError):
    """An event came in a state that does not know it: a broken invariant of ours, never a caller's fault."""


class Transitions(Generic[S, E]):
    """Where each event leads from each state. `str()` of it is the table, a state a line, for people."""

    def __init__(self, table: Mapping[tuple[S, E], S]) -> None:
        self._table = dict(table)

    def next(self, state: S, event: E, before: Sequence[E] = ()) -> S:
        """The state after `event`. `before`: the events that led here, oldest first, which an error shows.

        Raises IllegalTransition for a pair that the table does not have.
        """
        try:
            return self._table[state, event]
        except KeyError:
            told = f"; before it: {', '.join(before)}" if before else ""
            raise IllegalTransition(f"event {event} in state {state}{told}") from None

    def legal(self) -> dict[tuple[S, E], S]:
        """The pairs that there are."""
        return dict(self._table)

    def __str__(self) -> str:
        lines: dict[str, list[str]] = {}
        for (state, event), after in self._table.items():
            lines.setdefault(state, []).append(f"{event} -> {after}")
            lines.setdefault(after, [])
        width = max(len(state) for state in lines)
        return "\n".join(f"{state:<{width}}  {', '.join(moves) or '(final)'}" for state, moves in lines.items())
