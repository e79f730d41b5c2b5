"""`megatoken up` and `down` where the spec asks for a RayCluster: applies it, follows it until it serves, ends it.

cluster/cli/up.py and cluster/cli/down.py hand over to it. The head pod starts the control plane by itself; what is
seen of it from here is what the API server proxies, the edge's health, so nothing of ours has to be reachable.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator

from megatoken.cluster.client.control import CommandError
from megatoken.cluster.client.progress import Progress
from megatoken.cluster.client.records import ClusterRecord, read_records, write_record
from megatoken.cluster.launchers.kuberay.api import Kubernetes, KubernetesError
from megatoken.cluster.launchers.kuberay.manifest import documents, object_name
from megatoken.cluster.launchers.kuberay.state import RayClusterState, state_of
from megatoken.cluster.launchers.load import launch_of
from megatoken.cluster.launchers.spec import KubeRayLaunch
from megatoken.cluster.runtime_dirs import state_directory
from megatoken.cluster.spec.cluster import ClusterSpec
from megatoken.cluster.start.kept import forget_launch, keep
from megatoken.cluster.view.human import duration

POLL_S = 1.0
CLEAR_S = 300.0  # for the pods to end; each has its grace
RAY_CLUSTER = "RayCluster"


def wants_kubernetes(spec: ClusterSpec) -> bool:
    """Whether the spec is to be launched on Kubernetes: it describes pods, and names no Ray that runs already."""
    return spec.ray.address == "local" and launch_of(spec.launch).kuberay is not None


@contextlib.contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except KubernetesError as error:
        raise CommandError(str(error)) from None


@_told()
def up_over_kubernetes(spec: ClusterSpec, *, wait: bool, timeout_s: float, doctor: bool) -> int:
    """Applies the spec and waits until every pod runs and the edge answers. Applied again, it is an update.

    Nothing is deleted when that takes too long: Kubernetes goes on trying, and `megatoken down` removes it.
    `doctor` has no meaning here: the machines are examined from a pod. Raises CommandError.
    """
    kube, progress = _kuberay(spec), Progress()
    states, api = state_directory(os.environ), Kubernetes(kube.namespace)
    known = next((record for record in read_records(states) if record.cluster == spec.cluster), None)
    if known is not None and known.kubernetes != kube.namespace:
        raise CommandError(f"cluster: {spec.cluster!r} is not allowed; it is up already elsewhere", 2)
    wanted = documents(spec, launch_of(spec.launch), kube)
    write_record(states, _record(spec, kube))
    keep(states, spec)
    for document in wanted:
        api.apply(document)
        progress.say(f"{document['kind']} {document['metadata']['name']} is applied in {kube.namespace}")
    deadline = time.monotonic() + timeout_s
    cluster = next(document for document in wanted if document["kind"] == RAY_CLUSTER)
    _wait_for_pods(api, cluster, deadline, timeout_s, progress)
    if wait and spec.edge.count and spec.edge.port:
        _wait_for_edge(api, spec, deadline, timeout_s, progress)
    door = f"service/{object_name(spec)} in {kube.namespace}"
    progress.say(f"cluster {spec.cluster} is up; clients use {door}, `megatoken down` takes it down")
    return 0


@_told()
def down_over_kubernetes(spec: ClusterSpec) -> None:
    """Deletes what was applied, last first, and waits until its pods are gone. Raises CommandError."""
    kube, progress = _kuberay(spec), Progress()
    api, deadline = Kubernetes(kube.namespace), time.monotonic() + CLEAR_S
    for document in reversed(documents(spec, launch_of(spec.launch), kube)):
        api.delete(document)
        progress.say(f"{document['kind']} {document['metadata']['name']} is being deleted")
    while pods := api.pods(object_name(spec)):
        if time.monotonic() > deadline:
            raise CommandError(f"{len(pods)} pods still end after {duration(CLEAR_S)}; run `megatoken down` again")
        progress.still(f"{len(pods)} pods end")
        time.sleep(POLL_S)
    forget_launch(state_directory(os.environ), spec.cluster)
    progress.say(f"cluster {spec.cluster} is down")


def _kuberay(spec: ClusterSpec) -> KubeRayLaunch:
    kube = launch_of(spec.launch).kuberay
    if kube is None:
        raise CommandError("launch.kuberay is missing: it describes the pods", 2)
    return kube


def _record(spec: ClusterSpec, kube: KubeRayLaunch) -> ClusterRecord:
    inside = f"{object_name(spec)}-head-svc.{kube.namespace}.svc"  # KubeRay's service of the head
    return ClusterRecord(
        cluster=spec.cluster,
        control=f"{inside}:{spec.control.port}",
        kubernetes=kube.namespace,
        tls=spec.security.client_tls,
    )


def _wait_for_pods(
    api: Kubernetes, cluster: dict[str, object], deadline: float, timeout_s: float, progress: Progress
) -> None:
    name, told = str(cluster["metadata"]["name"]), ""  # type: ignore[index]
    while True:
        found = api.look(cluster)
        state = state_of(found or cluster, api.pods(name)) if found else RayClusterState("it is gone", failed=True)
        if state.text != told:
            told = state.text
            progress.say(f"{name}: {told}")
        if state.failed:
            raise CommandError(f"RayCluster {name} failed: {state.text}")
        if state.ready:
            return
        if time.monotonic() > deadline:
            raise CommandError(f"RayCluster {name} is not ready within {duration(timeout_s)}: {state.text}")
        progress.still(f"{name}: {told}")
        time.sleep(POLL_S)


def _wait_for_edge(api: Kubernetes, spec: ClusterSpec, deadline: float, timeout_s: float, progress: Progress) -> None:
    name, tls = object_name(spec), spec.security.tls is not None
    while not api.answers(name, "http-edge", "/health", tls=tls):
        if time.monotonic() > deadline:
            why = "`megatoken status` in the head pod (kubectl exec) says why"
            raise CommandError(f"no model is served within {duration(timeout_s)}; {why}")
        progress.still("every pod runs; the first model starts")
        time.sleep(POLL_S)
