"""The circuit breaker of one replica: closed, open after failures in a row, half-open during a probe.

    CLOSED ── `failures` in a row ──> OPEN ── its pause is over ──> HALF_OPEN ── success ──> CLOSED
                                       └───────── failure (pause doubles) ──────┘

The probe is the router's own (Worker.Probe, see link): no caller's request finds out whether a replica is well again.
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

    @property
    def closed(self) -> bool:
        """Whether requests may go there."""
        return self.state is CircuitState.CLOSED

    def begin_probe(self, now: float) -> bool:
        """Whether the pause is over, and a probe is due: the circuit is half-open until that succeeded or failed."""
        if self.state is not CircuitState.OPEN or now < self.until_s:
            return False
        self.state = CircuitState.HALF_OPEN
        return True

    def succeeded(self) -> None:
        """A first token or the probe's came."""
        self.failures = 0
        if self.state is not CircuitState.CLOSED:
            self.state = CircuitState.CLOSED
            self.pause_s = 0.0

    def trip(self, now: float) -> None:
        """The replica hangs: open at once, whatever came before."""
        self.failures = max(self.failures, self.failures_to_open - 1)
        self.failed(now)

    def failed(self, now: float) -> None:
        """The replica failed a request, its session or a probe."""
        self.failures += 1
        if self.state is CircuitState.HALF_OPEN or (
            self.state is CircuitState.CLOSED and self.failures >= self.failures_to_open
        ):
            self.pause_s = min(max(self.open_s, self.pause_s * 2), self.max_open_s)
            self.until_s = now + self.pause_s
            self.state = CircuitState.OPEN
