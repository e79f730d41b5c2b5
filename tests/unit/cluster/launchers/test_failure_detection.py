"""Every way to start Ray carries one set of failure-detection settings, under names that this Ray reads."""

from __future__ import annotations

import importlib.util
import ipaddress
import mmap
import re
import shlex
from pathlib import Path

import pytest
import yaml

from deploy.netns.hosts import Network
from deploy.netns.ray_nodes import RayNodes
from megatoken.cluster.launchers.failure_detection import FAILURE_DETECTION
from megatoken.cluster.launchers.load import launch_of
from megatoken.cluster.launchers.render import render
from megatoken.cluster.spec.load import load_spec
from tests.support.paths import REPOSITORY

EXAMPLES = REPOSITORY / "deploy" / "examples"
STARTS_RAY = {"ssh": "up.sh", "systemd": "gpu-01.service", "slurm": "megatoken.sbatch"}


def rendered(way: str) -> dict[str, str]:
    example = "ssh" if way == "systemd" else way
    spec = load_spec((EXAMPLES / f"{example}.yaml").read_text())
    return {artefact.name: artefact.text for artefact in render(way, spec, launch_of(spec.launch))}


def settings_in(text: str) -> dict[str, str]:
    """Failure-detection settings of a shell script or unit, whatever stands around NAME=VALUE."""
    words = re.findall(r"\b(RAY_(?:health_check|grpc_|gcs_rpc)\w+)=([\w.]+)", text)
    return dict(words)


@pytest.mark.parametrize("way", sorted(STARTS_RAY))
def test_scripts_and_units_carry_the_settings(way: str) -> None:
    assert settings_in(rendered(way)[STARTS_RAY[way]]) == dict(FAILURE_DETECTION)


def test_every_compose_service_that_starts_ray_carries_the_settings() -> None:
    services = yaml.safe_load(rendered("compose")["compose.yaml"])["services"]
    starting = [body for body in services.values() if "start" in shlex.join(map(str, body.get("command", ())))]
    assert len(starting) >= 2
    for body in starting:
        assert FAILURE_DETECTION.items() <= body["environment"].items()


def test_every_kubernetes_pod_that_runs_ray_carries_the_settings() -> None:
    documents = [yaml.safe_load(part) for part in rendered("kuberay")["raycluster.yaml"].split("\n---\n")]
    (cluster,) = [document for document in documents if document and document["kind"] == "RayCluster"]
    groups = [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]
    assert len(groups) >= 2
    for group in groups:
        container = group["template"]["spec"]["containers"][0]
        given = {entry["name"]: entry.get("value") for entry in container["env"]}
        assert FAILURE_DETECTION.items() <= given.items()


def test_the_clusters_of_network_namespaces_run_with_the_settings(tmp_path: Path) -> None:
    network = Network("unmade", ipaddress.IPv4Network("10.0.0.0/24"), 0, [])
    network.directory = tmp_path
    assert RayNodes(network, devices=1).detection == dict(FAILURE_DETECTION)


@pytest.mark.parametrize("name", FAILURE_DETECTION)
def test_ray_reads_every_setting(name: str) -> None:
    """Ray ignores a name that it does not know, so a release that renames one would undo the fencing in silence."""
    found = importlib.util.find_spec("ray")
    assert found is not None
    assert found.submodule_search_locations
    programs = Path(found.submodule_search_locations[0]) / "core" / "src" / "ray"
    for program in ("gcs/gcs_server", "raylet/raylet"):
        with open(programs / program, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            assert content.find(name.encode()) >= 0 or content.find(name.removeprefix("RAY_").encode() + b"\0") >= 0
