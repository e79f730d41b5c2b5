"""The circuit breaker of one replica: closed, open after failures in a row, half-open for one probing request.

    CLOSED ── `failures` in a row ──> OPEN ── its pause is over ──> HALF_OPEN ── success ──> CLOSED
                                       └───────── failure (pause doubles) ──────┘

A caller's own error is neither a failure nor a success of the replica, and is never reported here.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class CircuitState(StrEnum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


@dataclass(slots=True)
class Circuit:
    failures_to_open: int
    open_s: float
    max_open_s: float
    state: CircuitState = CircuitState.CLOSED
    failures: int = 0
    pause_s: float = 0.0
    until_s: float = 0.0
    probe: int = -1  # slot of the request that probes; -1: none does

    def allows(self, now: float) -> bool:
        """Whether a request may go there; moves OPEN to HALF_OPEN when its pause is over."""
        if self.state is CircuitState.OPEN and now >= self.until_s:
            self.state = CircuitState.HALF_OPEN
            self.probe = -1
        return self.state is CircuitState.CLOSED or (self.state is CircuitState.HALF_OPEN and self.probe < 0)

    def sent(self, slot: int) -> None:
        """A request went there, under this number."""
        if self.state is CircuitState.HALF_OPEN:
            self.probe = slot

    def succeeded(self) -> None:
        """A first token came."""
        self.failures = 0
        self.probe = -1
        if self.state is not CircuitState.CLOSED:
            self.state = CircuitState.CLOSED
            self.pause_s = 0.0

    def let_go(self, slot: int) -> None:
        """A request left the replica, however that came. If it was the probe, and there is no verdict, probe again."""
        if self.probe == slot:
            self.probe = -1

    def trip(self, now: float) -> None:
        """The replica hangs: open at once, whatever came before."""
        self.failures = max(self.failures, self.failures_to_open - 1)
        self.failed(now)

    def failed(self, now: float) -> None:
        """The replica failed a request, or its session."""
        self.failures += 1
        if self.state is CircuitState.HALF_OPEN or (
            self.state is CircuitState.CLOSED and self.failures >= self.failures_to_open
        ):
            self.pause_s = min(max(self.open_s, self.pause_s * 2), self.max_open_s)
            self.until_s = now + self.pause_s
            self.state = CircuitState.OPEN
            self.probe = -1
