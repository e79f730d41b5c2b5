"""A KubeRay RayCluster, and what it needs beside it: the spec as a ConfigMap, a service for the edge. Pure.

The token: `authOptions.mode: token` makes the operator generate a secret and hand it to every pod (KubeRay 1.5.1+).
Every pod runs cluster/launchers/node, which works out the pod's interface and supervises the `ray start` command that
the operator generated (annotation ray.io/overwrite-container-cmd); the head brings the controller up once Ray runs.
Ray's node labels are appended to that command: the operator refuses them among rayStartParams, and its chart has no
other place for them. Also the same as values for the operator's `ray-cluster` Helm chart, which knows no authOptions:
there the token is a secret of the user's.
"""

from __future__ import annotations

import json
from typing import Any

import yaml

from megatoken.cluster.launchers.artefact import Artefact
from megatoken.cluster.launchers.node.command import RAY_HABITS, spec_on
from megatoken.cluster.launchers.spec import KubeRayLaunch, LaunchSpec, PodGroup
from megatoken.cluster.spec.cluster import ClusterSpec
from megatoken.cluster.spec.load import dump_spec

RAY_VERSION = "2.60.0"  # what the images carry: pyproject.toml pins it
MIB = 1 << 20
SPEC_DIRECTORY, SPEC_FILE = "/etc/megatoken", "spec.yaml"
DIRECTORY = "/tmp/megatoken-node"
BESIDE = {"megatoken/part": "beside"}  # what the Helm chart does not make
MANIFEST_HEADER = """\
# Written by `megatoken render kuberay`; render again instead of editing. Needs the KubeRay operator 1.5.1 or later.
#   kubectl apply -f raycluster.yaml
#   kubectl -n {namespace} wait --for=jsonpath='{{.status.state}}'=ready raycluster/{name} --timeout=20m
"""
VALUES_HEADER = """\
# Values for the KubeRay project's chart `ray-cluster`. Written by `megatoken render kuberay`.
#   kubectl -n {namespace} create secret generic {name}-token --from-literal=auth_token="$(openssl rand -hex 32)"
#   kubectl apply -f raycluster.yaml --selector=megatoken/part=beside    (the spec and the service)
#   helm -n {namespace} install {name} kuberay/ray-cluster -f values.yaml
"""
GRACE_S = 90  # for replicas to drain and Ray to end in order


def kuberay_artefacts(spec: ClusterSpec, launch: LaunchSpec) -> list[Artefact]:
    """Raises ValueError when the spec has no `launch.kuberay`."""
    kube = launch.kuberay
    if kube is None:
        raise ValueError("launch.kuberay is missing: it describes the pods")
    manifest = "---\n".join(_yaml(document) for document in documents(spec, launch, kube))
    named = {"namespace": kube.namespace, "name": object_name(spec)}
    return [
        Artefact("raycluster.yaml", MANIFEST_HEADER.format(**named) + manifest),
        Artefact("values.yaml", VALUES_HEADER.format(**named) + _yaml(helm_values(spec, launch, kube))),
    ]


def documents(spec: ClusterSpec, launch: LaunchSpec, kube: KubeRayLaunch) -> list[dict[str, Any]]:
    """What is applied, in this order: the spec, the RayCluster, the service."""
    return [_config_map(spec, kube), ray_cluster(spec, launch, kube), _service(spec, kube)]


def object_name(spec: ClusterSpec) -> str:
    """Of the RayCluster and of the service."""
    return f"megatoken-{spec.cluster}"


def ray_cluster(spec: ClusterSpec, launch: LaunchSpec, kube: KubeRayLaunch) -> dict[str, Any]:
    """The RayCluster resource, as ray.io/v1 has it."""
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": {
            "name": object_name(spec),
            "namespace": kube.namespace,
            "labels": _labels(spec),
            "annotations": {"ray.io/overwrite-container-cmd": "true"},
        },
        "spec": {
            "rayVersion": RAY_VERSION,
            "authOptions": {"mode": "token"},
            "headGroupSpec": {
                "rayStartParams": _start_params(spec, launch, kube.head, head=True),
                "template": _template(spec, launch, kube, kube.head, head=True),
            },
            "workerGroupSpecs": [
                {
                    "groupName": group.name,
                    "replicas": group.pods,
                    "minReplicas": group.pods,
                    "maxReplicas": group.pods,
                    "rayStartParams": _start_params(spec, launch, group, head=False),
                    "template": _template(spec, launch, kube, group, head=False),
                }
                for group in kube.workers
            ],
        },
    }


def helm_values(spec: ClusterSpec, launch: LaunchSpec, kube: KubeRayLaunch) -> dict[str, Any]:
    """Values for the `ray-cluster` chart: the first group is `worker`, the others `additionalWorkerGroups`."""
    first, *others = kube.workers
    repository, _, tag = kube.image.rpartition(":")
    return {
        "fullnameOverride": object_name(spec),
        "annotations": {"ray.io/overwrite-container-cmd": "true"},
        "image": {"repository": repository or kube.image, "tag": tag, "pullPolicy": kube.image_pull_policy},
        "imagePullSecrets": [{"name": name} for name in kube.image_pull_secrets],
        "head": {
            "rayVersion": RAY_VERSION,
            **_helm_group(spec, launch, kube, kube.head, head=True),
        },
        "worker": _helm_workers(spec, launch, kube, first),
        "additionalWorkerGroups": {
            "smallGroup": {"disabled": True},
            **{group.name: {"disabled": False, **_helm_workers(spec, launch, kube, group)} for group in others},
        },
    }


def _helm_workers(spec: ClusterSpec, launch: LaunchSpec, kube: KubeRayLaunch, group: PodGroup) -> dict[str, Any]:
    sizes = {"replicas": group.pods, "minReplicas": group.pods, "maxReplicas": group.pods}
    return {"groupName": group.name, **sizes, **_helm_group(spec, launch, kube, group, head=False)}


def _helm_group(
    spec: ClusterSpec, launch: LaunchSpec, kube: KubeRayLaunch, group: PodGroup, *, head: bool
) -> dict[str, Any]:
    pod = _template(spec, launch, kube, group, head=head)["spec"]
    (container,) = pod["containers"]
    return {
        "rayStartParams": _start_params(spec, launch, group, head=head),
        "containerEnv": [*container["env"], *_token_env(spec)],
        "command": container["command"],
        "args": container["args"],
        "resources": container["resources"],
        "securityContext": container["securityContext"],
        "nodeSelector": pod.get("nodeSelector", {}),
        "tolerations": pod.get("tolerations", []),
        "volumes": pod["volumes"],
        "volumeMounts": container["volumeMounts"],
    }


def _start_params(spec: ClusterSpec, launch: LaunchSpec, group: PodGroup, *, head: bool) -> dict[str, str]:
    """Options of `ray start`, as the operator takes them: strings, quoted once more where they hold JSON."""
    params = {
        "num-cpus": "0",
        "num-gpus": str(group.gpus or 0),
        "object-store-memory": str(spec.ray.object_store_mib * MIB),
        "disable-usage-stats": "true",
    }
    if head:
        params |= {"port": str(launch.ports.head), "dashboard-host": "0.0.0.0"}
    if group.cpu_devices:
        params["resources"] = f"'{json.dumps({'cpu_device': group.cpu_devices}, separators=(',', ':'))}'"
    for name, port in (
        ("node-manager-port", launch.ports.node_manager),
        ("object-manager-port", launch.ports.object_manager),
    ):
        if port is not None:
            params[name] = str(port)
    if launch.ports.workers:
        params |= {"min-worker-port": str(launch.ports.workers[0]), "max-worker-port": str(launch.ports.workers[1])}
    return params  # fmt: skip


def _template(
    spec: ClusterSpec, launch: LaunchSpec, kube: KubeRayLaunch, group: PodGroup, *, head: bool
) -> dict[str, Any]:
    pod: dict[str, Any] = {
        "containers": [_container(spec, launch, kube, group, head=head)],
        "volumes": _volumes(spec, kube, group, head=head),
        "terminationGracePeriodSeconds": GRACE_S,
    }
    if kube.image_pull_secrets:
        pod["imagePullSecrets"] = [{"name": name} for name in kube.image_pull_secrets]
    if group.node_selector:
        pod["nodeSelector"] = dict(group.node_selector)
    if group.tolerations:
        pod["tolerations"] = [dict(toleration) for toleration in group.tolerations]
    if kube.host_network:
        pod |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    return {"metadata": {"labels": {**_labels(spec), "megatoken/group": group.name}}, "spec": pod}


def _container(
    spec: ClusterSpec, launch: LaunchSpec, kube: KubeRayLaunch, group: PodGroup, *, head: bool
) -> dict[str, Any]:
    amounts = {"cpu": group.cpu, "memory": group.memory, **group.resources}
    if group.gpus and group.device_resource:
        amounts[group.device_resource] = str(group.gpus)
    container: dict[str, Any] = {
        "name": "ray-head" if head else "ray-worker",
        "image": group.image or kube.image,
        "imagePullPolicy": kube.image_pull_policy,
        "command": ["/bin/bash", "-c", "--"],
        "args": [_command(spec, group, head=head)],
        "env": _environment(spec, group),
        "resources": {"limits": amounts, "requests": dict(amounts)},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"add": ["IPC_LOCK"]}},
        "volumeMounts": _mounts(kube, head=head),
    }
    if head:
        ports = {"gcs-server": launch.ports.head, "control": spec.control.port, "router": spec.routers.port}
        ports["edge"] = spec.edge.port
        container["ports"] = [{"name": name, "containerPort": port} for name, port in ports.items() if port]
    return container


def _command(spec: ClusterSpec, group: PodGroup, *, head: bool) -> str:
    """The operator's own `ray start` command, under our supervisor; $VARIABLES are the shell's in the pod."""
    interface = group.interface or spec.network.interface
    options = f' --interface "{interface}"' if interface else ""
    then = f" --then 'megatoken up --detach --no-wait -f {SPEC_DIRECTORY}/{SPEC_FILE}'" if head else ""
    node = f'exec python3 -m megatoken.cluster.launchers.node run --directory {DIRECTORY} --address "$MEGATOKEN_POD_IP"'
    labels = ",".join(f"{name}={value}" for name, value in sorted(group.node_labels.items()))
    ray = f"$KUBERAY_GEN_RAY_START_CMD --labels={labels}" if labels else "$KUBERAY_GEN_RAY_START_CMD"
    return f'ulimit -n 65536; {node}{options}{then} -- bash -c "{ray}"'


def _environment(spec: ClusterSpec, group: PodGroup) -> list[dict[str, Any]]:
    """RAY_AUTH_MODE and RAY_AUTH_TOKEN are the operator's to add."""
    plain = {**RAY_HABITS, **spec.network.env, **group.env}
    address = {"name": "MEGATOKEN_POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}
    return [address, *({"name": name, "value": value} for name, value in plain.items())]


def _token_env(spec: ClusterSpec) -> list[dict[str, Any]]:
    secret = {"name": f"{object_name(spec)}-token", "key": "auth_token"}
    return [
        {"name": "RAY_AUTH_MODE", "value": "token"},
        {"name": "RAY_AUTH_TOKEN", "valueFrom": {"secretKeyRef": secret}},
    ]


def _volumes(spec: ClusterSpec, kube: KubeRayLaunch, group: PodGroup, *, head: bool) -> list[dict[str, Any]]:
    volumes: list[dict[str, Any]] = [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": group.shm}}]
    if kube.models_claim:
        volumes.append({"name": "models", "persistentVolumeClaim": {"claimName": kube.models_claim, "readOnly": True}})
    if head:
        volumes.append({"name": "spec", "configMap": {"name": f"{object_name(spec)}-spec"}})
    return volumes


def _mounts(kube: KubeRayLaunch, *, head: bool) -> list[dict[str, Any]]:
    mounts: list[dict[str, Any]] = [{"name": "shm", "mountPath": "/dev/shm"}]
    if kube.models_claim:
        mounts.append({"name": "models", "mountPath": "/models", "readOnly": True})
    if head:
        mounts.append({"name": "spec", "mountPath": SPEC_DIRECTORY, "readOnly": True})
    return mounts


def _config_map(spec: ClusterSpec, kube: KubeRayLaunch) -> dict[str, Any]:
    metadata = {"name": f"{object_name(spec)}-spec", "namespace": kube.namespace, "labels": {**_labels(spec), **BESIDE}}
    data = {SPEC_FILE: dump_spec(spec_on(spec, "auto"))}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}


def _service(spec: ClusterSpec, kube: KubeRayLaunch) -> dict[str, Any]:
    """The doors for clients: the OpenAI edge and the token router. The controller's port stays inside."""
    ports = [("http-edge", spec.edge.port), ("grpc-router", spec.routers.port)]
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": object_name(spec), "namespace": kube.namespace, "labels": {**_labels(spec), **BESIDE}},
        "spec": {
            "type": kube.service_type,
            "selector": {"ray.io/cluster": object_name(spec), "ray.io/node-type": "head"},
            "ports": [{"name": name, "port": port, "targetPort": port} for name, port in ports if port],
        },
    }


def _labels(spec: ClusterSpec) -> dict[str, str]:
    return {"app.kubernetes.io/name": "megatoken", "app.kubernetes.io/instance": spec.cluster}


class _Dumper(yaml.SafeDumper):
    """Blocks for text with line breaks, and no anchors: both for the reader."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def _yaml(document: dict[str, Any]) -> str:
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=1000)
