"""A ClusterStatus as text for a terminal. Pure; `megatoken status` and the demo print it."""

from __future__ import annotations

from megatoken.cluster.decide.replica import FINAL
from megatoken.cluster.view.human import duration, number, table
from megatoken.v1 import control_pb2, throughput_pb2

ENDED_SHOWN = 5
LEAST_SHARE = 0.005  # of what is lost: less reads as nothing


def status_text(status: control_pb2.ClusterStatus) -> str:
    """Everything `megatoken status` prints."""
    parts = [_headline(status), _nodes(status), _models(status), _replicas(status), _processes(status)]
    return "\n\n".join(part for part in parts if part)


def rates_of(sample: throughput_pb2.ThroughputSample, seconds: int) -> dict[tuple[str, str], float]:
    """Generated tokens/s by (kind, name) over the window of `seconds`."""
    return {
        (row.kind, row.name): window.generated_tokens_per_s
        for row in sample.rows
        for window in row.windows
        if window.seconds == seconds
    }


def _headline(status: control_pb2.ClusterStatus) -> str:
    lines = [f"cluster {status.cluster}  generation {status.generation}  controller {status.controller}"]
    if status.metrics_address:
        lines.append(f"metrics http://{status.metrics_address}/metrics, of every process at /sd")
    sample = status.throughput
    if sample.ranks:
        rates = rates_of(sample, 10)
        rate = next((value for (kind, _), value in rates.items() if kind == "cluster"), 0.0)
        row = next((row for row in sample.rows if row.kind == "cluster"), None)
        text = f"{number(rate)} tokens/s over 10 s, summed by {sample.ranks} ranks ({sample.backend})"
        if row is not None and row.efficiency:
            text += f", scaling efficiency {row.efficiency:.1%}"
        if row is not None and row.workers.energy_mj:
            text += f", {1000 * row.workers.generated_tokens / row.workers.energy_mj:.2f} tokens/J"
        if not sample.complete:
            text += f"; incomplete: {sample.incomplete_reason}"
        lines.append(text)
    else:
        lines.append(
            f"{number(sum(model.generated_tokens_per_s for model in status.models))} tokens/s (no agent sums yet)"
        )
    return "\n".join(lines)


def _nodes(status: control_pb2.ClusterStatus) -> str:
    rows = [
        [
            node.node,
            node.address,
            node.site or "-",
            node.state,
            node.device_kind or "-",
            f"{node.devices_used}/{node.devices}",
            "; ".join(node.devices_out),
        ]
        for node in status.nodes
    ]
    return "\n".join(table(["NODE", "ADDRESS", "SITE", "STATE", "DEVICES", "USED", "OUT"], rows))


def _models(status: control_pb2.ClusterStatus) -> str:
    efficiencies = {entry.model: entry for entry in status.efficiency}
    rows = [
        [
            model.model,
            f"{model.ready}/{model.wanted}",
            str(model.running),
            str(model.waiting),
            number(model.generated_tokens_per_s),
            *_efficiency(efficiencies.get(model.model)),
            model.rollout,
        ]
        for model in status.models
    ]
    lines = table(["MODEL", "READY", "RUNNING", "QUEUED", "TOKENS/S", "OF BEST", "LOST TO", "UPDATE"], rows)
    lines += [f"  {model.model} is blocked: {model.blocked}" for model in status.models if model.blocked]
    return "\n".join(lines)


def _efficiency(entry: control_pb2.ModelEfficiency | None) -> tuple[str, str]:
    """Share of the capacity, and the causes of the rest with theirs, the largest first."""
    if entry is None or not entry.capacity_tokens_per_s:
        return "-", "-"
    lost = sorted(entry.lost, key=lambda loss: -loss.tokens_per_s)
    shares = [(loss.cause, loss.tokens_per_s / entry.capacity_tokens_per_s) for loss in lost]
    causes = ", ".join(f"{cause} {share:.0%}" for cause, share in shares if share >= LEAST_SHARE)
    return f"{entry.tokens_per_s / entry.capacity_tokens_per_s:.0%}", causes or "-"


def _replicas(status: control_pb2.ClusterStatus) -> str:
    ended = [replica for replica in status.replicas if replica.state in FINAL]
    shown = [replica for replica in status.replicas if replica.state not in FINAL] + ended[-ENDED_SHOWN:]
    undelivered = {row.name: _undelivered(row.workers) for row in status.throughput.rows if row.kind == "replica"}
    rows = [
        [
            replica.replica,
            replica.state,
            f"{replica.engine} (runs no model)" if replica.engine == "simulated" else replica.engine,
            duration(replica.age_s),
            str(replica.running),
            str(replica.waiting),
            f"{replica.kv_usage:.0%}",
            number(replica.generated_tokens_per_s),
            undelivered.get(replica.replica, "-"),
            ", ".join(dict.fromkeys(rank.partition(": ")[2] for rank in replica.ranks)),
            replica.reason or replica.start_phase,
        ]
        for replica in shown
    ]
    numbers = ["RUNNING", "QUEUED", "KV", "TOKENS/S", "UNDELIVERED"]
    header = ["REPLICA", "STATE", "ENGINE", "AGE", *numbers, "WHERE", "REASON"]
    return "\n".join(table(header, rows)) if rows else "no replicas"


def _undelivered(counted: throughput_pb2.Totals) -> str:
    """Tokens that the engine made and no router was sent: dropped with their requests, or lost with the worker."""
    tokens = counted.made_tokens - counted.generated_tokens
    dropped = f" ({counted.dropped_tokens} dropped)" if counted.dropped_tokens else ""
    return f"{max(tokens, 0)}{dropped}"


def _processes(status: control_pb2.ClusterStatus) -> str:
    rows = [[entry.name, entry.kind, entry.state, entry.address, entry.reason] for entry in status.processes]
    return "\n".join(table(["PROCESS", "KIND", "STATE", "ADDRESS", "REASON"], rows)) if rows else ""
