"""Decides how many replicas a model should have. Pure: demand, capacity, objectives, memory and the time are given.

Load is measured where it arrives, in replicas' full time: the routers add up what each request that came will take of a
replica (refused ones too), so that an overloaded fleet is seen to be one. From that

    need = arriving load / (utilisation x confidence) + queued work / time to work it off

`need` counts replicas that should exist, so those that are starting are neither forgotten nor asked for twice. It grows
at once, by what load will be when a replica that is asked for now can serve; it falls when nearly all of the last
`scale_down_after_s` needed less, so that one late request neither resets the wait nor is lost in it. `confidence` falls
while a latency objective is missed, and grows slowly while it is met with room to spare: it is what the fleet's own
latencies say about a utilisation that was chosen on paper.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from statistics import median
from typing import Final

from megatoken.cluster.spec.autoscale import AutoscaleSpec

TOLERANCE: Final = 0.05  # of a replica: less than that is not worth one
NOISE: Final = 0.05  # of a fleet: what load does by chance, which the free share of replicas takes
DOWN_MARGIN: Final = 0.10  # of a replica that must be left free after one goes
DOWN_SHARE: Final = 0.85  # of the samples in the window must need less
TREND_S: Final = 60.0  # whose halves show how load grows; a burst shorter than half of one is none
GROWTH: Final = 1.5  # times the present load is the most that a trend foresees
PATIENCE_S: Final = 20.0  # between two steps down
JUDGED_S: Final = 60.0  # the time that latencies are of: each is judged once
LOST: Final = 0.96  # of confidence kept when an objective is missed
GAINED: Final = 1.03
LEAST_CONFIDENCE: Final = 0.6
MOST_UTILISATION: Final = 0.95  # that confidence may lead to
COMFORT: Final = 0.8  # of an objective: below it confidence grows,
COMFORT_S: Final = 120.0  # once in so long: what was missed a while ago will come again
STILL_TOKENS_PER_S: Final = 0.1  # a smoothed rate does not reach nought


class Why(StrEnum):
    """What decided."""

    STEADY = "steady"
    LOAD = "load"
    QUEUE = "queue"
    UNUSED = "unused"
    IDLE = "idle"
    ARRIVAL = "arrival"
    BOUND = "bound"


@dataclass(frozen=True, slots=True)
class Demand:
    """What one model is asked for now, over all routers."""

    load: float | None
    """Replicas' full time that arrives a second; None: not measured yet."""
    requests_per_s: float
    """That arrive, refused ones included."""
    waiting: int
    """Requests that wait for a place."""
    waiting_work_s: float
    """A replica's full time that those will take; 0.0 while that is not known."""
    running: int
    tokens_per_s: float
    """That are generated. What runs without making any is a count that leaked, and keeps nothing up."""
    ttft_s: float | None = None
    """p99 over the last minute; None: nothing ended."""
    itl_s: float | None = None


@dataclass(frozen=True, slots=True)
class Size:
    """The fleet of one model."""

    target: int
    ready: int
    slots: int
    """Requests that one replica runs at once; 0: not known."""
    start_s: float
    """What a start takes, from the ask to the first token."""


@dataclass(frozen=True, slots=True)
class Memory:
    """What the next decision must know of those before."""

    since_s: float = -math.inf
    """When the samples began."""
    samples: tuple[tuple[float, float], ...] = ()
    """(when, replicas needed), oldest first."""
    confidence: float = 1.0
    changed_s: float = -math.inf
    """When the target last changed."""
    judged_s: float = -math.inf
    """When the confidence last changed."""
    active_s: float = -math.inf
    """When a request last arrived or waited, or a token was made."""


@dataclass(frozen=True, slots=True)
class Sizing:
    """How many, and what it rests on."""

    target: int
    why: Why
    need: float
    """Replicas, before bounds and whole numbers."""
    memory: Memory


def decide(spec: AutoscaleSpec, demand: Demand, size: Size, memory: Memory, now: float) -> Sizing:
    """`now` is monotonic, in seconds, and never goes back."""
    active = demand.requests_per_s > 0 or demand.waiting > 0 or demand.tokens_per_s > STILL_TOKENS_PER_S
    if memory.since_s == -math.inf:
        memory = replace(memory, since_s=now, active_s=now, changed_s=now, judged_s=now)
    if active:
        memory = replace(memory, active_s=now)
    memory = _judge_latency(spec, demand, size, memory, now)
    load = _load(demand, size)
    steady = load / (spec.utilisation * memory.confidence)
    ahead = _ahead(steady, memory.samples, size.start_s, now)
    backlog = demand.waiting_work_s / max(spec.queue_s, size.start_s / 2)  # it grows while they start
    need = max(steady, ahead) + backlog
    memory = _remember(memory, steady, spec.scale_down_after_s, now)
    target, why = _target(spec, size, memory, active, need, backlog, now)
    if target != size.target:
        memory = replace(memory, changed_s=now)
    return Sizing(target, why, need, memory)


def _target(
    spec: AutoscaleSpec, size: Size, memory: Memory, active: bool, need: float, backlog: float, now: float
) -> tuple[int, Why]:
    least = max(spec.min_replicas, 1 if active else 0)
    up = max(math.ceil(need - max(TOLERANCE, NOISE * size.target)), least)
    if up > size.target:
        wanted = min(up, spec.max_replicas)
        if size.target == 0:
            return wanted, Why.ARRIVAL
        if wanted > size.target:
            return wanted, Why.QUEUE if backlog > need / 2 else Why.LOAD
    bounded = min(max(size.target, spec.min_replicas), spec.max_replicas)
    if bounded != size.target or up > size.target:
        return bounded, Why.BOUND
    if least == 0 and now - memory.active_s >= spec.scale_down_after_s:
        return 0, Why.IDLE
    if size.target and now - max(memory.since_s + spec.scale_down_after_s, memory.changed_s + PATIENCE_S) >= 0:
        usual = _usual(memory.samples, now - spec.scale_down_after_s)
        down = max(math.ceil(usual + DOWN_MARGIN - TOLERANCE), up, 1)
        if down < size.target:
            return down, Why.UNUSED
    return size.target, Why.STEADY


def _load(demand: Demand, size: Size) -> float:
    """In replicas' full time a second; by places in batches until a replica was measured."""
    if demand.load is not None:
        return demand.load
    if not size.slots:
        return 0.0
    return (demand.running + demand.waiting) / size.slots


def _ahead(steady: float, samples: Sequence[tuple[float, float]], start_s: float, now: float) -> float:
    """The need when a replica asked for now serves, if it goes on growing as it did over TREND_S."""
    late = [need for at_s, need in samples if now - TREND_S / 2 <= at_s]
    early = [need for at_s, need in samples if now - TREND_S <= at_s < now - TREND_S / 2]
    if not late or not early:
        return steady
    growth = (median(late) - median(early)) / (TREND_S / 2)
    return min(steady + max(0.0, growth) * start_s, GROWTH * steady)


def _judge_latency(spec: AutoscaleSpec, demand: Demand, size: Size, memory: Memory, now: float) -> Memory:
    """Trusts the utilisation less while an objective is missed, and more while all are met with room to spare."""
    measured = ((demand.ttft_s, spec.ttft_p99_s), (demand.itl_s, spec.itl_p99_s))
    shares = [seen / bound for seen, bound in measured if seen is not None and bound is not None]
    if not shares or now - memory.judged_s < JUDGED_S:
        return memory
    if max(shares) > 1.0 and memory.confidence > LEAST_CONFIDENCE:
        return replace(memory, confidence=max(LEAST_CONFIDENCE, memory.confidence * LOST), judged_s=now)
    most = MOST_UTILISATION / spec.utilisation
    if max(shares) < COMFORT and memory.confidence < most and now - memory.judged_s >= COMFORT_S:
        return replace(memory, confidence=min(most, memory.confidence * GAINED), judged_s=now)
    return memory


def _remember(memory: Memory, need: float, window_s: float, now: float) -> Memory:
    kept = [sample for sample in memory.samples if sample[0] > now - max(window_s, TREND_S)]
    return replace(memory, samples=(*kept, (now, need)))


def _usual(samples: Sequence[tuple[float, float]], since_s: float) -> float:
    """What all but a few of the samples needed at most."""
    needs = sorted(need for at_s, need in samples if at_s >= since_s)
    return needs[min(len(needs) - 1, math.ceil(DOWN_SHARE * len(needs)) - 1)] if needs else 0.0
