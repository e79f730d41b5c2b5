"""What applying a spec over another would do, in sentences, and what may not be changed on a running cluster. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from megatoken.cluster.spec.cluster import ClusterSpec
from megatoken.cluster.spec.load import SpecError
from megatoken.cluster.spec.model import ModelSpec

FIXED = ("cluster", "ray", "control", "security", "launch")  # read once, when the cluster starts


def changes_between(before: ClusterSpec | None, after: ClusterSpec) -> list[str]:
    """One sentence for each difference; empty when nothing changes. Raises SpecError for what needs a new cluster."""
    if before is None:
        return [f"model {model.name}: {model.replicas} replicas are started" for model in after.models]
    problems = [
        f"{section}: cannot be changed while the cluster runs; take it down and start it with the new spec"
        for section in FIXED
        if getattr(before, section) != getattr(after, section)
    ]
    if problems:
        raise SpecError(problems)
    found: list[str] = []
    for model in after.models:
        found += _model_changes(before.model(model.name), model)
    for model in before.models:
        if after.model(model.name) is None:
            found.append(f"model {model.name}: is removed; its {model.replicas} replicas drain")
    for section in ("routers", "edge", "agents", "network", "tracing", "log_level"):
        if getattr(before, section) != getattr(after, section):
            found.append(f"{section}: changes; its processes are exchanged one after the other")
    return found


def _model_changes(before: ModelSpec | None, after: ModelSpec) -> list[str]:
    if before is None:
        return [f"model {after.name}: is added with {after.replicas} replicas"]
    if before == after:
        return []
    found = []
    if before.revision != after.revision:
        fields = [name for name in type(after).model_fields if getattr(before, name) != getattr(after, name)]
        changed = ", ".join(name for name in fields if name != "replicas")
        found.append(
            f"model {after.name}: {changed} changes; replicas are exchanged, {after.update.surge} extra at most"
        )
    if before.replicas != after.replicas:
        found.append(f"model {after.name}: {before.replicas} -> {after.replicas} replicas")
    return found or [f"model {after.name}: settings change; no replica restarts"]


def previous_specs(
    before: ClusterSpec | None, after: ClusterSpec, kept: Mapping[str, ModelSpec], settled: frozenset[str]
) -> dict[str, ModelSpec | None]:
    """By changed model: what a rollback returns to, or None for none.

    `kept` are the present ones, `settled` the models whose replicas all run the spec of `before`: only such a spec is
    known to work. An update on top of a running update keeps the older, working spec.
    """
    if before is None:
        return {}
    found: dict[str, ModelSpec | None] = {}
    for model in after.models:
        old = before.model(model.name)
        if old is None or old.revision == model.revision:
            continue
        found[model.name] = old if model.name in settled else kept.get(model.name)
    for model in before.models:
        if after.model(model.name) is None:
            found[model.name] = None
    return found
