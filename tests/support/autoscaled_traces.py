"""Load over time, and a fleet that autoscaling sizes under it: second by second, from a seed. Simulated throughout.

Lengths have the medians of the Azure LLM inference traces of 2023 (Patel et al., Splitwise, arXiv:2311.18677: 1,020
tokens in and 129 out for conversations, 1,500 and 13 for code), log-normal around them. A replica does a second of work
a second; what it has not done waits, first come first served.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatoken.cluster.autoscale.decide import Demand, Memory, Size, decide
from megatoken.cluster.autoscale.demand import LATENCY_S, RATE_S
from megatoken.cluster.spec.autoscale import AutoscaleSpec

PREFILL_TOKENS_PER_S, DECODE_TOKENS_PER_S = 20_000.0, 1_000.0  # of a replica with a full batch
LENGTHS = {"conversation": (1020, 0.9, 129, 0.9), "code": (1500, 0.8, 13, 1.0)}  # median and sigma in, then out
SECONDS = 14_400
SHARES = tuple(round(0.5 + 0.01 * step, 2) for step in range(50))  # utilisations that the oracle tries

Floats = npt.NDArray[np.float64]


def bursty(at_s: float) -> float:
    """Waves of an hour, and every 100 s ten seconds with half as many more."""
    return (1.0 + 0.3 * math.sin(2 * math.pi * at_s / 3600)) * (1.5 if at_s % 100 < 10 else 1.0)


def diurnal(at_s: float) -> float:
    """A day in four hours, from a fifth of the peak to the peak."""
    return 0.2 + 0.4 * (1 - math.cos(2 * math.pi * at_s / SECONDS))


def step(at_s: float) -> float:
    return 0.5 if at_s < 4800 else 1.5


def flash_crowd(at_s: float) -> float:
    """Five times as many within two minutes, for a quarter of an hour."""
    rising = min(1.0, max(0.0, (at_s - 3600) / 120))
    falling = min(1.0, max(0.0, (at_s - 4500) / 120))
    return 0.4 + 1.6 * (rising - falling)


@dataclass(frozen=True, slots=True)
class Trace:
    """What arrives in each second."""

    requests: npt.NDArray[np.int64]
    work_s: Floats
    """A replica's full time, by second."""


def make_trace(shape: Callable[[float], float], lengths: str, peak: float, seconds: int, seed: int) -> Trace:
    """Poisson arrivals; `peak` replicas are kept busy where the shape is 1."""
    rng = np.random.default_rng(seed)
    prompt, prompt_sigma, output, output_sigma = LENGTHS[lengths]
    mean_s = (
        prompt * math.exp(prompt_sigma**2 / 2) / PREFILL_TOKENS_PER_S
        + output * math.exp(output_sigma**2 / 2) / DECODE_TOKENS_PER_S
    )
    requests = rng.poisson([shape(float(second)) * peak / mean_s for second in range(seconds)])
    total = int(requests.sum())
    works = (
        prompt * rng.lognormal(0.0, prompt_sigma, total) / PREFILL_TOKENS_PER_S
        + output * rng.lognormal(0.0, output_sigma, total) / DECODE_TOKENS_PER_S
    )
    ends = np.cumsum(requests)
    cumulative = np.concatenate(([0.0], np.cumsum(works)))
    return Trace(requests, cumulative[ends] - cumulative[ends - requests])


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of a trace."""

    met: float
    """Share of requests whose first token came in time."""
    replica_s: float
    """That existed, starting ones included."""
    changes: int
    """Of the number of replicas."""


def waits(trace: Trace, ready: Sequence[int]) -> Floats:
    """Seconds that a request of each second waits, and the work left at the end of each."""
    left, found = 0.0, []
    for work_s, replicas in zip(trace.work_s, ready, strict=True):
        found.append((left + work_s / 2) / replicas if replicas else 3600.0)
        left = max(0.0, left + work_s - replicas)
    return np.maximum(0.0, np.array(found) - 0.5)  # work of its own second is done as it comes


def share_met(trace: Trace, ready: Sequence[int], ttft_s: float) -> float:
    in_time = waits(trace, ready) <= ttft_s
    return float(trace.requests[in_time].sum() / max(1, trace.requests.sum()))


def autoscaled(trace: Trace, spec: AutoscaleSpec, start_s: float, first: int) -> Outcome:
    """The shipped decision, once a second, on what a router would have counted."""
    target, memory, left = first, Memory(), 0.0
    up: list[float] = [0.0] * first  # when each replica serves
    ready_by_second: list[int] = []
    replica_s, changes = 0.0, 0
    recent: deque[tuple[float, int]] = deque(maxlen=int(LATENCY_S))  # (wait, requests) of each second
    for second, (requests, work_s) in enumerate(zip(trace.requests, trace.work_s, strict=True)):
        now = float(second)
        ready = sum(at <= now for at in up)
        ready_by_second.append(ready)
        replica_s += len(up)
        wait_s = max(0.0, (left + work_s / 2) / ready - 0.5) if ready else 60.0
        recent.append((wait_s, int(requests)))
        left = max(0.0, left + work_s - ready)
        first_second = max(0, second - int(RATE_S) + 1)
        seconds = second + 1 - first_second
        demand = Demand(
            load=float(trace.work_s[first_second : second + 1].sum()) / seconds,
            requests_per_s=float(trace.requests[first_second : second + 1].sum()) / seconds,
            waiting=math.ceil(left),
            waiting_work_s=left if left > ready else 0.0,  # what a batch holds does not wait
            running=ready,
            tokens_per_s=min(left + work_s, ready) * DECODE_TOKENS_PER_S,
            ttft_s=_p99(recent),
        )
        decision = decide(spec, demand, Size(target, ready, 64, start_s), memory, now)
        memory = decision.memory
        changes += decision.target != target
        target = decision.target
        up += [now + start_s] * (target - len(up))
        while len(up) > target:  # those that do not serve yet first
            up.remove(max(up))
    return Outcome(share_met(trace, ready_by_second, spec.ttft_p99_s or math.inf), replica_s, changes)


def _p99(recent: Iterable[tuple[float, int]]) -> float | None:
    by_wait = sorted(recent, reverse=True)
    rank, seen = 0.01 * sum(requests for _, requests in by_wait), 0
    for wait_s, requests in by_wait:
        seen += requests
        if requests and seen >= rank:
            return wait_s
    return None


def oracle(trace: Trace, ttft_s: float, start_s: float) -> Outcome:
    """The cheapest number that follows the load, known ahead, and meets the objective; replicas start in time."""
    around = np.convolve(trace.work_s, np.ones(61) / 61, mode="same")
    for share in reversed(SHARES):
        ready = np.maximum(1, np.ceil(around / share)).astype(int)
        met = share_met(trace, ready.tolist(), ttft_s)
        if met >= 0.99:
            started = float(np.maximum(0, np.diff(ready)).sum())
            return Outcome(met, float(ready.sum()) + started * start_s, int((np.diff(ready) != 0).sum()))
    raise AssertionError("no constant share meets it")
