"""Why a model has as many replicas as it has, in words."""

from __future__ import annotations

from megatoken.v1 import control_pb2

REASONS = {
    "steady": "as many as are needed",
    "load": "what arrives needs more",
    "queue": "what waits needs more, to be worked off in time",
    "unused": "fewer would have been enough for long enough",
    "idle": "nobody asked for long enough",
    "arrival": "somebody asks",
    "bound": "the spec allows no other number",
}


def scaling_text(one: control_pb2.Autoscaling) -> str:
    """One line: the reason and the figures that it rests on."""
    figures = [f"needed {one.need:.2f}"]
    if one.HasField("load"):
        figures.append(f"arriving {one.load:.2f} replicas' full time at {one.utilisation:.0%}")
    figures.append(f"{one.requests_per_s:.1f} requests/s")
    if one.waiting:
        figures.append(f"{one.waiting} waiting")
    return f"{REASONS.get(one.why, one.why)} ({', '.join(figures)})"


def explanation(model: control_pb2.ModelStatus) -> str:
    """A few lines on one model. One without autoscaling has as many as its spec says."""
    if not model.HasField("autoscaling"):
        return (
            f"{model.model}: {model.wanted} wanted, {model.ready} ready; a fixed number, as the spec has no autoscale"
        )
    one = model.autoscaling
    lines = [
        f"{model.model}: {one.target} wanted, {model.ready} ready, between {one.min_replicas} and {one.max_replicas}",
        f"  because   {scaling_text(one)}",
        f"  a start   takes {one.start_s:.0f} s",
    ]
    if one.HasField("ttft_p99_s"):
        lines.append(f"  first token  p99 {one.ttft_p99_s:.3f} s over the last minute")
    if one.HasField("itl_p99_s"):
        lines.append(f"  between tokens  p99 {one.itl_p99_s:.3f} s over the last minute")
    if model.blocked:
        lines.append(f"  blocked   {model.blocked}")
    return "\n".join(lines)
