"""How near a model is to the best that its replicas have shown, and to what the rest is lost. Pure.

The best of a spec on a device kind is the highest rate that one of its replicas held over RATE_S. The capacity of a
model is the best of each of its replicas together. What a replica makes less than its best is lost to one cause:

    ramp       it serves for less than RAMP_S
    idle       it has fewer requests than at its best, and none of the model waits
    imbalance  it has fewer requests than at its best, while others of the model wait
    queue      it has as many requests as at its best, and makes less: they wait for each other

so that rate + ramp + idle + imbalance + queue = capacity, where no replica exceeds its best.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

RATE_S: Final = 10.0
RAMP_S: Final = 30.0
MARGIN: Final = 0.01  # a new best is better by this share; less is noise, and each is written down
CAUSES: Final = ("ramp", "idle", "imbalance", "queue")

Spec = tuple[str, str, str]
"""(model, revision, device kind)"""


@dataclass(frozen=True, slots=True)
class Best:
    """The highest rate of one replica, with its conditions."""

    tokens_per_s: float
    running: int
    """Requests in its batch then."""
    replica: str
    unix_s: float


@dataclass(frozen=True, slots=True)
class Reading:
    """What a READY replica does now."""

    replica: str
    spec: Spec
    tokens_per_s: float
    """Over the last RATE_S."""
    running: int
    waiting: int
    ready_s: float
    """Since it became READY."""


@dataclass(frozen=True, slots=True)
class Efficiency:
    """Of one model, in generated tokens/s."""

    model: str
    capacity: float
    rate: float
    lost: Mapping[str, float] = field(default_factory=dict)
    """By cause, all CAUSES."""

    @property
    def held_back_by(self) -> str:
        """The cause that costs most; empty: nothing is lost."""
        cause = max(CAUSES, key=lambda name: self.lost.get(name, 0.0))
        return cause if self.lost.get(cause, 0.0) > 0.0 else ""


def learn(best: Mapping[Spec, Best], readings: Iterable[Reading], unix_s: float) -> Mapping[Spec, Best]:
    """With what the readings show to be better."""
    found = dict(best)
    for reading in readings:
        known = found.get(reading.spec)
        least = known.tokens_per_s * (1 + MARGIN) if known is not None else 0.0
        if reading.ready_s >= RATE_S and reading.tokens_per_s > least:
            found[reading.spec] = Best(reading.tokens_per_s, reading.running, reading.replica, unix_s)
    return found


def efficiency_of(model: str, best: Mapping[Spec, Best], readings: Sequence[Reading], queued: int) -> Efficiency | None:
    """Of a model by its READY replicas; None while nothing is known of one. `queued`: its requests in routers."""
    if not readings or any(reading.spec not in best for reading in readings):
        return None
    waits = queued > 0 or any(reading.waiting for reading in readings)
    lost = dict.fromkeys(CAUSES, 0.0)
    for reading in readings:
        at_best = best[reading.spec]
        lost[_cause(reading, at_best, waits=waits)] += max(0.0, at_best.tokens_per_s - reading.tokens_per_s)
    capacity = sum(best[reading.spec].tokens_per_s for reading in readings)
    return Efficiency(model, capacity, sum(reading.tokens_per_s for reading in readings), lost)


def _cause(reading: Reading, best: Best, *, waits: bool) -> str:
    if reading.ready_s < RAMP_S:
        return "ramp"
    if reading.running >= best.running:
        return "queue"
    return "imbalance" if waits else "idle"
