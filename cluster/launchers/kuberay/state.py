"""How far a RayCluster and its pods are, as they say themselves. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

GROUP_LABEL: Final = "ray.io/group"  # KubeRay's: the group of a pod
FAILED: Final = "failed"
READY: Final = "ready"


@dataclass(frozen=True, slots=True)
class RayClusterState:
    """`text` is one phrase for people; `ready`: every pod runs; `failed`: KubeRay has given it up."""

    text: str
    ready: bool = False
    failed: bool = False


def state_of(cluster: Mapping[str, Any], pods: Sequence[Mapping[str, Any]]) -> RayClusterState:
    """Of the RayCluster as the API server has it, and of its pods."""
    status = cluster.get("status") or {}
    word = str(status.get("state") or "")
    running = sum(1 for pod in pods if _phase(pod) == "Running" and _is_ready(pod))
    parts = [f"{running} of {wanted_pods(cluster)} pods run"]
    troubles = dict.fromkeys(text for text in map(_trouble, pods) if text)
    parts += [*troubles, *([str(status["reason"])] if status.get("reason") else [])]
    return RayClusterState("; ".join(parts), ready=word == READY, failed=word == FAILED)


def wanted_pods(cluster: Mapping[str, Any]) -> int:
    """The head and every worker."""
    groups = cluster["spec"].get("workerGroupSpecs") or []
    return 1 + sum(int(group.get("replicas") or 0) * int(group.get("numOfHosts") or 1) for group in groups)


def _phase(pod: Mapping[str, Any]) -> str:
    return str((pod.get("status") or {}).get("phase") or "Pending")


def _is_ready(pod: Mapping[str, Any]) -> bool:
    conditions = (pod.get("status") or {}).get("conditions") or []
    return all(entry.get("status") == "True" for entry in conditions if entry.get("type") == "Ready")


def _trouble(pod: Mapping[str, Any]) -> str:
    """Why a pod does not run, in Kubernetes' own words, behind its group; empty where it does."""
    status = pod.get("status") or {}
    group = (pod["metadata"].get("labels") or {}).get(GROUP_LABEL) or pod["metadata"]["name"]
    for entry in status.get("conditions") or []:
        if entry.get("type") == "PodScheduled" and entry.get("status") == "False":
            return f"{group}: {entry.get('reason')}: {entry.get('message')}"
    for container in status.get("containerStatuses") or []:
        state = container.get("state") or {}
        waiting = state.get("waiting") or state.get("terminated") or {}
        if waiting.get("reason"):
            message = f": {waiting['message']}" if waiting.get("message") else ""
            return f"{group}: {waiting['reason']}{message}"
    return "" if _phase(pod) == "Running" else f"{group}: {_phase(pod)}"
