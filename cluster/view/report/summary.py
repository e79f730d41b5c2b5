"""The last hours in figures, from the controller's history and events. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from megatoken.cluster.decide.efficiency import CAUSES
from megatoken.v1 import control_pb2

MILLION: Final = 1e6
HOUR_S: Final = 3600.0


@dataclass(frozen=True, slots=True)
class ModelSummary:
    """One model. Rates are generated tokens/s, means over the time covered."""

    model: str
    generated_tokens: int
    prompt_tokens: int
    cached_tokens: int
    finished: int
    failed: int
    tokens_per_s: float
    capacity: float
    lost: Mapping[str, float]
    device_hours: Mapping[str, float]
    """By device kind, of replicas that served."""
    joules: float | None
    """None: no device reports it."""
    cost: float | None
    """Of the device hours; None where a kind has no price."""
    rates: Sequence[tuple[float, float, float]] = field(default=())
    """(unix time, tokens/s, capacity) of each minute."""

    @property
    def share_of_best(self) -> float | None:
        """Of its capacity; None: not known."""
        return self.tokens_per_s / self.capacity if self.capacity else None

    @property
    def cost_per_million(self) -> float | None:
        """Of generated tokens."""
        if self.cost is None or not self.generated_tokens:
            return None
        return self.cost / self.generated_tokens * MILLION

    @property
    def tokens_per_joule(self) -> float | None:
        return self.generated_tokens / self.joules if self.joules else None


@dataclass(frozen=True, slots=True)
class Summary:
    """Everything the page says."""

    cluster: str
    from_s: float
    until_s: float
    covered_s: float
    """What the history covers of it."""
    models: tuple[ModelSummary, ...]
    failovers: int
    refused: int
    starts: tuple[tuple[float, str, str], ...]
    """(unix time, replica, how long its start took and with what) of the time."""
    failures: tuple[tuple[float, str, str], ...]
    """(unix time, replica, why) of those that failed."""
    devices_out: tuple[str, ...]


def summary_of(
    history: control_pb2.History, status: control_pb2.ClusterStatus, seconds: float, prices: Mapping[str, float]
) -> Summary:
    """Of the last `seconds` until the status. `prices`: of a device by kind, an hour."""
    by_model: dict[str, list[control_pb2.HistoryPoint]] = {}
    for point in history.points:
        by_model.setdefault(point.model, []).append(point)
    routers = by_model.pop("", [])
    out = [f"{node.node} {device}" for node in status.nodes for device in node.devices_out]
    return Summary(
        cluster=status.cluster,
        from_s=status.unix_s - seconds,
        until_s=status.unix_s,
        covered_s=sum(point.seconds for point in routers),
        models=tuple(_model(name, points, prices) for name, points in sorted(by_model.items())),
        failovers=sum(point.resumed for point in routers),
        refused=sum(point.refused for point in routers),
        starts=_moves(history.events, "READY"),
        failures=_moves(history.events, "FAILED"),
        devices_out=tuple(out),
    )


def _model(name: str, points: Sequence[control_pb2.HistoryPoint], prices: Mapping[str, float]) -> ModelSummary:
    covered_s = sum(point.seconds for point in points) or 1.0
    lost = dict.fromkeys(CAUSES, 0.0)
    device_hours: dict[str, float] = {}
    for point in points:
        for loss in point.lost:
            lost[loss.cause] = lost.get(loss.cause, 0.0) + loss.tokens_per_s * point.seconds / covered_s
        for kind, seconds in point.device_seconds.items():
            device_hours[kind] = device_hours.get(kind, 0.0) + seconds / HOUR_S
    joules = sum(point.counted.energy_mj for point in points) / 1000
    priced = all(kind in prices for kind in device_hours)
    return ModelSummary(
        model=name,
        generated_tokens=sum(point.counted.generated_tokens for point in points),
        prompt_tokens=sum(point.counted.prompt_tokens for point in points),
        cached_tokens=sum(point.counted.cached_tokens for point in points),
        finished=sum(point.counted.requests_finished for point in points),
        failed=sum(point.counted.requests_failed for point in points),
        tokens_per_s=sum(point.tokens_per_s * point.seconds for point in points) / covered_s,
        capacity=sum(point.capacity_tokens_per_s * point.seconds for point in points) / covered_s,
        lost=lost,
        device_hours=device_hours,
        joules=joules or None,
        cost=sum(hours * prices[kind] for kind, hours in device_hours.items()) if priced and device_hours else None,
        rates=tuple((point.unix_s, point.tokens_per_s, point.capacity_tokens_per_s) for point in points),
    )


def _moves(events: Sequence[control_pb2.Event], state: str) -> tuple[tuple[float, str, str], ...]:
    """Replicas that came into a state, with what was said of it behind the states themselves."""
    found = [event for event in events if event.kind == "replica.state" and event.fields.get("to") == state]
    return tuple((event.unix_s, event.subject, event.fields.get("why", "")) for event in found)
