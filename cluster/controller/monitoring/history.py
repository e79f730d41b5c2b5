"""What each model did, minute by minute, for KEPT_S: beside the desired state, so that a restart loses a minute.

Fed with a status now and then; a point is what was counted since the last one, and the means of what goes up and down.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from megatoken.cluster.controller.state import StateStore
from megatoken.cluster.decide.replica import ReplicaState
from megatoken.v1 import control_pb2, router_pb2, throughput_pb2

STEP_S: Final = 60.0
KEPT_S: Final = 7 * 86_400.0
LOOK_S: Final = 5.0  # between looks: a status of thousands of replicas costs a tick some milliseconds
MOST_POINTS: Final = 1440  # of a model in one answer: some 300 KB
COUNTED: Final = (
    *("generated_tokens", "prompt_tokens", "cached_tokens"),
    *("requests_finished", "requests_failed", "energy_mj"),
)


@dataclass(slots=True)
class _Sum:
    """Of one model since the last point."""

    ticks: int = 0
    rate: float = 0.0
    capacity: float = 0.0
    lost: dict[str, float] = field(default_factory=dict)
    device_s: dict[str, float] = field(default_factory=dict)


class History:
    """Lives in the controller's event loop. Times are seconds since 1970."""

    def __init__(self, store: StateStore) -> None:
        self._store = store
        self._began_s = 0.0
        self._looked_s = 0.0
        self._sums: dict[str, _Sum] = {}
        self._totals: dict[str, throughput_pb2.Totals] = {}
        self._routers: dict[str, tuple[int, int]] = {}
        self._resumed = self._refused = 0

    def look(
        self, status: control_pb2.ClusterStatus, kinds: Mapping[str, str], routers: Iterable[router_pb2.RouterStatus]
    ) -> None:
        """One tick. `kinds`: device kind by replica. Writes a point a model once STEP_S have passed."""
        now_s = status.unix_s
        if not self._began_s or now_s < self._looked_s:  # the first look, or a clock that was set back
            self._began_s = self._looked_s = now_s
        step_s, self._looked_s = now_s - self._looked_s, now_s
        efficiency = {entry.model: entry for entry in status.efficiency}
        for model in status.models:
            own = self._sums.setdefault(model.model, _Sum())
            own.ticks += 1
            own.rate += model.generated_tokens_per_s
            entry = efficiency.get(model.model)
            if entry is not None:
                own.capacity += entry.capacity_tokens_per_s
                for loss in entry.lost:
                    own.lost[loss.cause] = own.lost.get(loss.cause, 0.0) + loss.tokens_per_s
        for replica in status.replicas:
            if replica.state == ReplicaState.READY and replica.model in self._sums:
                held, kind = self._sums[replica.model].device_s, kinds.get(replica.replica, "")
                held[kind] = held.get(kind, 0.0) + step_s * len(replica.ranks)
        self._count_routers(routers)
        if now_s - self._began_s >= STEP_S:
            self._write(status, now_s)

    def _count_routers(self, routers: Iterable[router_pb2.RouterStatus]) -> None:
        for router in routers:
            resumed, refused = self._routers.get(router.router, (0, 0))
            if router.resumes < resumed or router.requests_refused < refused:  # it was started again
                resumed = refused = 0
            if router.router in self._routers:
                self._resumed += router.resumes - resumed
                self._refused += router.requests_refused - refused
            self._routers[router.router] = (router.resumes, router.requests_refused)

    def _write(self, status: control_pb2.ClusterStatus, now_s: float) -> None:
        seconds = now_s - self._began_s
        rows = {row.name: row.workers for row in status.throughput.rows if row.kind == "model"}
        points = [control_pb2.HistoryPoint(unix_s=now_s, seconds=seconds, resumed=self._resumed, refused=self._refused)]
        for model in status.models:
            own = self._sums.get(model.model, _Sum())
            ticks = max(1, own.ticks)
            point = control_pb2.HistoryPoint(
                unix_s=now_s,
                seconds=seconds,
                model=model.model,
                tokens_per_s=own.rate / ticks,
                capacity_tokens_per_s=own.capacity / ticks,
                lost=[control_pb2.LostRate(cause=cause, tokens_per_s=lost / ticks) for cause, lost in own.lost.items()],
                ready=model.ready,
                wanted=model.wanted,
                device_seconds=own.device_s,
                counted=self._since(model.model, rows.get(model.model)),
            )
            points.append(point)
        self._began_s, self._resumed, self._refused = now_s, 0, 0
        self._sums.clear()
        self._store.add_history([(point.unix_s, point.model, point.SerializeToString()) for point in points], KEPT_S)

    def _since(self, model: str, totals: throughput_pb2.Totals | None) -> throughput_pb2.Totals:
        """What was counted since the last point; nothing of the first, which may hold days."""
        counted = throughput_pb2.Totals()
        if totals is None:
            return counted
        before = self._totals.get(model)
        self._totals[model] = totals
        if before is not None:
            for name in COUNTED:
                setattr(counted, name, max(0, getattr(totals, name) - getattr(before, name)))
        return counted

    def points(self, since_s: float) -> list[control_pb2.HistoryPoint]:
        """Those that ended after a time, by model, oldest first; of a long time several are made one."""
        by_model: dict[str, list[control_pb2.HistoryPoint]] = {}
        for value in self._store.history(since_s):
            point = control_pb2.HistoryPoint.FromString(value)
            by_model.setdefault(point.model, []).append(point)
        return [point for _, points in sorted(by_model.items()) for point in thinned(points, MOST_POINTS)]


def thinned(points: Sequence[control_pb2.HistoryPoint], most: int) -> list[control_pb2.HistoryPoint]:
    """At most so many of one model's, each of as many that follow each other."""
    size = -(-len(points) // most)
    return [_joined(points[first : first + size]) for first in range(0, len(points), size)] if points else []


def _joined(points: Sequence[control_pb2.HistoryPoint]) -> control_pb2.HistoryPoint:
    """Counts together; means by time; the rest as at the end."""
    made = control_pb2.HistoryPoint()
    made.CopyFrom(points[-1])
    made.seconds = sum(point.seconds for point in points)
    made.resumed, made.refused = sum(point.resumed for point in points), sum(point.refused for point in points)
    made.ClearField("lost")
    lost: dict[str, float] = {}
    made.tokens_per_s = made.capacity_tokens_per_s = 0.0
    for point in points:
        share = point.seconds / made.seconds if made.seconds else 1.0 / len(points)
        made.tokens_per_s += point.tokens_per_s * share
        made.capacity_tokens_per_s += point.capacity_tokens_per_s * share
        for loss in point.lost:
            lost[loss.cause] = lost.get(loss.cause, 0.0) + loss.tokens_per_s * share
    for point in points[:-1]:
        for name in COUNTED:
            setattr(made.counted, name, getattr(made.counted, name) + getattr(point.counted, name))
        for kind, seconds in point.device_seconds.items():
            made.device_seconds[kind] += seconds
    made.lost.extend(control_pb2.LostRate(cause=cause, tokens_per_s=rate) for cause, rate in lost.items())
    return made
