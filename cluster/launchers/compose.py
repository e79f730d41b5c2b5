"""A compose file: a head and serving containers on one machine, each with its own address. Pure.

The token is a compose secret from a file that only its owner may read; every container runs cluster/launchers/node.
"""

from __future__ import annotations

from typing import Any

import yaml

from megatoken.cluster.launchers.artefact import Artefact
from megatoken.cluster.launchers.node.command import TOKEN_FILE, node_command, spec_on
from megatoken.cluster.launchers.spec import ComposeLaunch, DeviceGroup, LaunchSpec
from megatoken.cluster.spec.cluster import ClusterSpec
from megatoken.cluster.spec.load import dump_spec

SECRET = "/run/secrets/ray_token"
HEAD = "head"
DIRECTORY = "/tmp/megatoken-node"


def compose_artefacts(spec: ClusterSpec, launch: LaunchSpec) -> list[Artefact]:
    """compose.yaml and the spec that the head reads. Raises ValueError when the spec has no `launch.compose`."""
    compose = launch.compose
    if compose is None:
        raise ValueError("launch.compose is missing: it says how many containers and of which image")
    header = (
        "# Written by `megatoken render compose`; render again instead of editing.\n"
        f"#   (umask 077; openssl rand -hex 32 >{TOKEN_FILE}) && docker compose -p megatoken-{spec.cluster} up\n"
    )
    text = header + yaml.safe_dump(_escaped(compose_document(spec, launch, compose)), sort_keys=False, width=1000)
    return [Artefact("compose.yaml", text), Artefact("spec.yaml", dump_spec(spec_on(spec, "auto")))]


def compose_document(spec: ClusterSpec, launch: LaunchSpec, compose: ComposeLaunch) -> dict[str, Any]:
    """The compose file as plain values."""
    head = _service(spec, launch, compose, DeviceGroup(env=compose.env, interface=compose.interface), head=True)
    workers = {
        f"node{number}": {
            **_service(spec, launch, compose, _group(compose), head=False),
            "depends_on": {HEAD: {"condition": "service_healthy"}},
        }
        for number in range(compose.nodes)
    }
    return {
        "services": {HEAD: head, **workers},
        "secrets": {TOKEN_FILE: {"file": f"./{TOKEN_FILE}"}},
    }


def _group(compose: ComposeLaunch) -> DeviceGroup:
    return DeviceGroup(**{name: getattr(compose, name) for name in DeviceGroup.model_fields})


def _service(
    spec: ClusterSpec, launch: LaunchSpec, compose: ComposeLaunch, group: DeviceGroup, *, head: bool
) -> dict[str, Any]:
    command = node_command(spec, launch.ports, group, ray="ray", head_address=HEAD, head=head, token_path=SECRET)
    node = ["python3", "-m", "megatoken.cluster.launchers.node", "run", "--directory", DIRECTORY]
    node += [] if head else ["--head", f"{HEAD}:{launch.ports.head}"]
    interface = group.interface or spec.network.interface
    node += ["--interface", interface] if interface else []
    node += ["--then", "megatoken up --detach --no-wait -f /etc/megatoken/spec.yaml"] if head else []
    service: dict[str, Any] = {
        "image": compose.image,
        "hostname": HEAD if head else None,
        "command": [*node, "--", *command.ray],
        "environment": dict(command.env),
        "secrets": [TOKEN_FILE],
        "shm_size": compose.shm,
        "init": True,
        "restart": "unless-stopped",
        "stop_grace_period": "90s",
        "volumes": [],
    }
    if compose.models:
        service["volumes"].append(f"{compose.models}:/models:ro")
    if head:
        service["volumes"].append("./spec.yaml:/etc/megatoken/spec.yaml:ro")
        service["ports"] = [f"127.0.0.1:{port}:{port}" for port in (spec.edge.port, spec.routers.port) if port]
        service["healthcheck"] = {
            "test": ["CMD-SHELL", f"test -e {DIRECTORY}/ready"],
            "interval": "3s",
            "timeout": "5s",
            "retries": 60,
        }
    elif compose.gpus:
        service |= _gpus(compose)
    return {name: value for name, value in service.items() if value not in (None, [])}


def _gpus(compose: ComposeLaunch) -> dict[str, Any]:
    """NVIDIA by compose's own reservation; AMD by the kernel driver's device files."""
    if compose.device_kind.startswith("mi"):
        return {
            "devices": ["/dev/kfd:/dev/kfd", "/dev/dri:/dev/dri"],
            "group_add": ["video", "render"],
            "security_opt": ["seccomp=unconfined"],
        }
    devices = [{"driver": "nvidia", "count": compose.gpus, "capabilities": ["gpu"]}]
    return {"deploy": {"resources": {"reservations": {"devices": devices}}}}


def _escaped(value: Any) -> Any:
    """Compose expands $NAME in every text; a double dollar stands for one."""
    if isinstance(value, dict):
        return {name: _escaped(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_escaped(part) for part in value]
    return value.replace("$", "$$") if isinstance(value, str) else value
