"""What `megatoken top` shows, as values: a ClusterStatus, a ThroughputSample and routers' statuses in, text out.

Pure: no terminal, network or clock. app.py draws what is decided here, feed.py fetches what goes in. A number
nobody reported is shown as "-", never as 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from megatoken.cluster.view.top.text import age, compact, milliseconds, percent, sparkline, whole
from megatoken.v1.control_pb2 import ClusterStatus, Event, ModelStatus, ReplicaStatus
from megatoken.v1.router_pb2 import RouterStatus
from megatoken.v1.throughput_pb2 import ThroughputRow, ThroughputSample

TABLE_WINDOW_S: Final = 10  # tables: steady enough to read; the headline uses 1 s
SIMULATED: Final = "simulated"
STATE_ORDER: Final = ("FAILED", "STARTING", "RESERVING", "DRAINING", "READY", "STOPPED")


@dataclass(frozen=True, slots=True)
class Inputs:
    """Everything one picture is made from. `routers` maps a router's name to its status."""

    status: ClusterStatus = field(default_factory=ClusterStatus)
    sample: ThroughputSample | None = None
    routers: dict[str, RouterStatus] = field(default_factory=dict)
    history: tuple[float, ...] = ()  # cluster tokens/s, a value a sample, oldest first
    unreachable_s: float = 0.0  # how long the controller has not answered; 0: it does
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Header:
    """The lines above the tables, without markup."""

    title: str
    rate: str
    spark: str
    lines: tuple[str, ...]
    warning: str


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table; `number` columns are aligned right, and sort with the largest first."""

    key: str
    title: str
    width: int
    number: bool
    least_width: int  # of the terminal, for the column to be shown


@dataclass(frozen=True, slots=True)
class TopRow:
    """One line of a table: its id, what each column shows and what it sorts by."""

    key: str
    model: str
    cells: dict[str, str]
    sort: dict[str, float | str]
    state: str


REPLICA_COLUMNS: Final = (
    Column("replica", "REPLICA", 16, False, 0),
    Column("model", "MODEL", 14, False, 102),
    Column("state", "STATE", 9, False, 0),
    Column("engine", "ENGINE", 9, False, 92),
    Column("node", "NODE", 10, False, 0),
    Column("rate", "TOK/S", 7, True, 0),
    Column("running", "RUN", 4, True, 0),
    Column("waiting", "WAIT", 4, True, 0),
    Column("kv", "KV", 4, True, 0),
    Column("efficiency", "EFF", 4, True, 108),
    Column("total", "TOKENS", 8, True, 118),
    Column("age", "AGE", 4, True, 0),
    Column("reason", "WHY", 30, False, 150),
)
MODEL_COLUMNS: Final = (
    Column("model", "MODEL", 20, False, 0),
    Column("ready", "READY", 7, True, 0),
    Column("rate", "TOK/S", 8, True, 0),
    Column("running", "RUN", 5, True, 0),
    Column("waiting", "WAIT", 5, True, 0),
    Column("efficiency", "EFF", 4, True, 0),
    Column("note", "NOTE", 15, False, 0),
)
REPLICA_SORTS: Final = ("replica", "state", "rate", "running", "waiting", "kv", "age", "node")


def columns_for(columns: Sequence[Column], width: int) -> tuple[Column, ...]:
    """Those that fit a terminal `width` cells wide."""
    return tuple(column for column in columns if width >= column.least_width)


def header(inputs: Inputs, width: int) -> Header:
    """Title, rate with its sparkline, latencies and counts."""
    status, sample = inputs.status, inputs.sample
    rate, row = cluster_rate(inputs), _row_of(sample, "cluster", None)
    ready = sum(model.ready for model in status.models)
    wanted = sum(model.wanted for model in status.models)
    alive = sum(node.state == "alive" for node in status.nodes)
    running = sum(model.running for model in status.models)
    waiting = sum(model.waiting for model in status.models)
    headline = f"{whole(rate)} tok/s" if rate is not None else "- tok/s"
    ceiling, held_back = _ceiling(inputs.routers)
    prefill = _window(row, 1, "prompt_tokens_per_s")
    cached = _window(row, 1, "cached_tokens_per_s")
    lines = (
        f"efficiency {percent(_cluster_efficiency(status, row))}"
        f"   10s {_rate_of(row, 10)}   1m {_rate_of(row, 60)}   5m {_rate_of(row, 300)}"
        f"   prefill {compact(prefill)}/s   cached {compact(cached)}/s",
        f"TTFT {_percentiles(inputs.routers, 'ttft_ms')}   ITL {_percentiles(inputs.routers, 'itl_ms')}",
        f"replicas {ready}/{wanted}   nodes {alive}/{len(status.nodes)}   running {running}   waiting {waiting}"
        + (f"   ceiling {percent(ceiling)}" if ceiling is not None else "")
        + (f" ({held_back})" if held_back else ""),
    )
    return Header(
        title=_title(status),
        rate=headline,
        spark=sparkline(inputs.history, max(width - len(headline) - 3, 8)),
        lines=lines,
        warning=warning_of(inputs),
    )


def _cluster_efficiency(status: ClusterStatus, row: ThroughputRow | None) -> float | None:
    """Against the stand-alone rates of the spec; without those, against the best that replicas have shown."""
    if row is not None and row.efficiency:
        return row.efficiency
    capacity = sum(entry.capacity_tokens_per_s for entry in status.efficiency)
    return sum(entry.tokens_per_s for entry in status.efficiency) / capacity if capacity else None


def _title(status: ClusterStatus) -> str:
    name = status.cluster or "?"
    engines = {replica.engine for replica in status.replicas if replica.engine}
    if SIMULATED in engines:
        name += "  SIMULATED" if engines == {SIMULATED} else "  partly SIMULATED"
    return f"megatoken top  {name}  generation {status.generation}"


def warning_of(inputs: Inputs) -> str:
    """The one thing to know first; empty when all is well."""
    if inputs.unreachable_s > 0:
        because = f": {inputs.reason}" if inputs.reason else ""
        return f"controller unreachable for {age(inputs.unreachable_s)}, what is below is old{because}"
    blocked = [f"{model.model}: {model.blocked}" for model in inputs.status.models if model.blocked]
    if blocked:
        return "blocked  " + "; ".join(blocked)
    sample = inputs.sample
    if sample is not None and sample.ranks and not sample.complete:
        return f"throughput incomplete: {sample.incomplete_reason or 'a rank is missing'}"
    return ""


def cluster_rate(inputs: Inputs) -> float | None:
    """Generated tokens a second: the collective's 1 s window, else the sum of the models' rates."""
    found = _window(_row_of(inputs.sample, "cluster", None), 1, "generated_tokens_per_s")
    if found is None and inputs.status.models:
        found = sum(model.generated_tokens_per_s for model in inputs.status.models)
    return found


def model_rows(inputs: Inputs) -> list[TopRow]:
    """One a model, by name."""
    return [_model_row(model, inputs.sample) for model in sorted(inputs.status.models, key=lambda model: model.model)]


def _model_row(model: ModelStatus, sample: ThroughputSample | None) -> TopRow:
    row = _row_of(sample, "model", model.model)
    rate = _window(row, TABLE_WINDOW_S, "generated_tokens_per_s")
    rate = model.generated_tokens_per_s if rate is None else rate
    efficiency = row.efficiency if row is not None and row.efficiency else None
    note = model.blocked or model.rollout
    cells = {
        "model": model.model,
        "ready": f"{model.ready}/{model.wanted}",
        "rate": compact(rate),
        "running": str(model.running),
        "waiting": str(model.waiting),
        "efficiency": percent(efficiency),
        "note": ("blocked: " if model.blocked else "") + note,
    }
    state = "FAILED" if model.wanted and not model.ready else "STARTING" if model.ready < model.wanted else "READY"
    return TopRow(model.model, model.model, cells, {"model": model.model, "rate": rate}, state)


def replica_rows(inputs: Inputs, sort: str = "replica", reverse: bool = False, find: str = "") -> list[TopRow]:
    """One a replica that matches `find` (in its id, model, node, state or engine), sorted by a column's key.

    Numbers sort largest first, names a to z, states with trouble first; `reverse` turns that round. Ties keep the
    order of ids, so that rows do not jump.
    """
    rows = [_replica_row(replica, inputs.sample) for replica in inputs.status.replicas]
    wanted = find.lower()
    rows = [row for row in rows if any(wanted in cell.lower() for key, cell in row.cells.items() if key != "reason")]
    rows.sort(key=lambda row: row.key)
    numeric = any(column.key == sort and column.number for column in REPLICA_COLUMNS)

    rows.sort(key=lambda row: row.sort[sort], reverse=numeric != reverse)
    return rows


def _replica_row(replica: ReplicaStatus, sample: ThroughputSample | None) -> TopRow:
    serving = replica.state in ("READY", "DRAINING")
    row = _row_of(sample, "replica", replica.replica)
    rate = _window(row, TABLE_WINDOW_S, "generated_tokens_per_s")
    rate = replica.generated_tokens_per_s if rate is None else rate
    efficiency = row.efficiency if row is not None and row.efficiency else None
    cells = {
        "replica": replica.replica,
        "model": replica.model,
        "state": replica.state,
        "engine": replica.engine or "-",
        "node": replica.node or "-",
        "rate": compact(rate) if serving else "-",
        "running": str(replica.running) if serving else "-",
        "waiting": str(replica.waiting) if serving else "-",
        "kv": percent(replica.kv_usage) if serving else "-",
        "efficiency": percent(efficiency),
        "total": compact(float(replica.generated_tokens)),
        "age": age(replica.age_s),
        "reason": replica.reason,
    }
    order = STATE_ORDER.index(replica.state) if replica.state in STATE_ORDER else len(STATE_ORDER)
    sort: dict[str, float | str] = {
        "replica": replica.replica,
        "node": replica.node,
        "state": float(order),
        "age": replica.age_s,
        "rate": rate,
        "running": replica.running,
        "waiting": replica.waiting,
        "kv": replica.kv_usage,
    }
    return TopRow(replica.replica, replica.model, cells, sort, replica.state)


def event_line(event: Event, clock: Callable[[float], str]) -> str:
    """One event as one line: time, subject, message and, where there is one, the cause."""
    cause = f" ({event.cause})" if event.cause else ""
    what = event.message or event.kind
    return (
        f"{clock(event.unix_s)}  {event.subject}: {what}{cause}" if event.subject else f"{clock(event.unix_s)}  {what}"
    )


def _row_of(sample: ThroughputSample | None, kind: str, name: str | None) -> ThroughputRow | None:
    if sample is None:
        return None
    return next((row for row in sample.rows if row.kind == kind and (name is None or row.name == name)), None)


def _window(row: ThroughputRow | None, seconds: int, what: str) -> float | None:
    if row is None:
        return None
    return next((float(getattr(window, what)) for window in row.windows if window.seconds == seconds), None)


def _rate_of(row: ThroughputRow | None, seconds: int) -> str:
    return compact(_window(row, seconds, "generated_tokens_per_s"))


def _percentiles(routers: dict[str, RouterStatus], name: str) -> str:
    """p50 / p90 / p99 over the last minute, of the worst router where there are several."""
    found = [list(getattr(router, name)) for router in routers.values() if len(getattr(router, name)) == 3]
    found = [values for values in found if any(values)]
    if not found:
        return "-"
    worst = [max(values) for values in zip(*found, strict=True)]
    return " / ".join(milliseconds(value) for value in worst) + " p50/p90/p99"


def _ceiling(routers: dict[str, RouterStatus]) -> tuple[float | None, str]:
    lowest = min(
        (router for router in routers.values() if router.ceiling > 0), key=lambda router: router.ceiling, default=None
    )
    return (None, "") if lowest is None else (lowest.ceiling, lowest.held_back_by)
