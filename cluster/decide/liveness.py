"""Whether replicas live and until when they may serve, from what their workers answer to renewals. Pure.

A worker that answers states how many steps its engine made and how many requests it has. An engine that has requests
and makes no step hangs, however well its process looks; a long prefill makes steps. An idle engine makes none, so now
and then one is asked for a token (Worker.Probe), and must make a step for it. cluster/controller/links.py asks; the
controller reads.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum


class Hang(StrEnum):
    """How a replica that Ray calls alive does not live."""

    NO_ANSWER = "no_answer"  # its worker process does not answer
    NO_STEP = "no_step"  # its engine has requests and makes no step
    NO_TOKEN = "no_token"  # its idle engine was asked for a token and made no step


@dataclass(frozen=True, slots=True)
class PartSeen:
    """What was found of one process of a replica that hangs, or that its node did not answer."""

    node: str
    """Its id."""
    part: str = ""
    """"worker", "engine", "rank 1"; empty: the node did not answer."""
    pid: int = 0
    state: str = ""
    """Why it cannot run; empty: nothing is wrong with it."""


@dataclass(frozen=True, slots=True)
class HangSeen:
    """A replica hangs, and for how long."""

    hang: Hang
    seconds: float
    parts: tuple[PartSeen, ...] = ()
    """Of its processes, as far as they were looked at."""


@dataclass(frozen=True, slots=True)
class LivenessLimits:
    """From the spec's control section."""

    lease_s: float
    hang_s: float
    probe_s: float
    """An idle engine is asked for a token when it made no step for this long."""


@dataclass(frozen=True, slots=True)
class Answered:
    """What one answer said, and when it came (seconds of the controller's monotonic clock)."""

    stamp_s: float
    """Of the worker's own clock: the next renewal counts from it."""
    steps: int
    unfinished: int
    at_s: float


@dataclass(frozen=True, slots=True)
class _Known:
    """What is known of one replica."""

    since_s: float
    last: Answered | None = None
    stepped_s: float = 0.0
    """When it was last seen to have made a step."""
    idle_s: float = 0.0
    """When it was last seen to have no request."""
    probed_s: float = 0.0
    missing_since_s: float = 0.0
    """When the token was asked for that did not come; 0: none is missing."""


class Liveness:
    """Of all replicas of one controller."""

    def __init__(self) -> None:
        self._known: dict[str, _Known] = {}

    def serves(self, replicas: Iterable[str], now: float) -> None:
        """These serve, by their ready lines; forgets all others."""
        self._known = {
            replica: self._known.get(replica) or _Known(now, stepped_s=now, idle_s=now) for replica in replicas
        }

    def stamp_s(self, replica: str) -> float:
        """What a renewal counts from; 0: no answer has told a moment yet."""
        known = self._known.get(replica)
        return known.last.stamp_s if known is not None and known.last is not None else 0.0

    def answered(self, replica: str, answer: Answered) -> None:
        """An answer came."""
        known = self._known.get(replica)
        if known is None:
            return
        changes: dict[str, float] = {}
        if known.last is None or answer.steps != known.last.steps:
            changes |= {"stepped_s": answer.at_s, "missing_since_s": 0.0}
        if not answer.unfinished:
            changes["idle_s"] = answer.at_s
        self._known[replica] = replace(known, last=answer, **changes)

    def to_probe(self, limits: LivenessLimits, now: float) -> list[str]:
        """Idle replicas whose turn it is to be asked for a token; it counts as asked."""
        due = [
            replica
            for replica, known in self._known.items()
            if known.last is not None
            and not known.last.unfinished
            and now - max(known.stepped_s, known.probed_s) >= limits.probe_s
        ]
        for replica in due:
            self._known[replica] = replace(self._known[replica], probed_s=now)
        return due

    def probe_failed(self, replica: str, asked_s: float) -> None:
        """The token that was asked for at `asked_s` did not come in time."""
        known = self._known.get(replica)
        if known is not None and known.stepped_s < asked_s:  # else it is busy with others' tokens
            self._known[replica] = replace(known, missing_since_s=asked_s)

    def hang(self, replica: str, limits: LivenessLimits, now: float) -> HangSeen | None:
        """How the replica hangs, if it does."""
        known = self._known.get(replica)
        if known is None:
            return None
        silent_s = now - (known.last.at_s if known.last is not None else known.since_s)
        if silent_s >= limits.lease_s:  # it has fenced itself, or cannot even do that
            return HangSeen(Hang.NO_ANSWER, silent_s)
        if known.missing_since_s:
            return HangSeen(Hang.NO_TOKEN, now - known.missing_since_s)
        if known.last is not None and known.last.unfinished:
            still_s = known.last.at_s - max(known.stepped_s, known.idle_s)  # of silence nothing is known
            if still_s >= limits.hang_s:
                return HangSeen(Hang.NO_STEP, still_s)
        return None

    def lease_until_s(self, replica: str, limits: LivenessLimits, now: float) -> float:
        """When a replica that answers no more has stopped serving.

        A controller that has had no answer yet takes the longest that an earlier one may have given.
        """
        known = self._known.get(replica)
        last_s = known.last.at_s if known is not None and known.last is not None else now
        return last_s + limits.lease_s
