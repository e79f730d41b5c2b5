"""What lies in deploy/ is what the examples render to, and images carry what pyproject.toml pins."""

from __future__ import annotations

import re
import tomllib

import pytest

from megatoken.cluster.inventory.model_shape import read_shape
from megatoken.cluster.inventory.topology import Device, Inventory, Node
from megatoken.cluster.launchers.load import launch_of
from megatoken.cluster.launchers.render import render
from megatoken.cluster.planning.plan import plan_cluster
from megatoken.cluster.planning.topology_file import NodeEntry
from megatoken.cluster.spec.load import load_spec
from tests.support.paths import REPOSITORY

ROOT = REPOSITORY
DEPLOY = ROOT / "deploy"
WAYS = {"ssh": "ssh", "systemd": "ssh", "slurm": "slurm", "kuberay": "kuberay", "compose": "compose"}


@pytest.mark.parametrize("way", sorted(WAYS))
def test_deployed_files_are_what_the_example_renders_to(way: str) -> None:
    spec = load_spec((DEPLOY / "examples" / f"{WAYS[way]}.yaml").read_text())
    for artefact in render(way, spec, launch_of(spec.launch)):
        path = DEPLOY / way / artefact.name
        assert path.read_text() == artefact.text, f"{path} is out of date: run deploy/render"
        assert bool(path.stat().st_mode & 0o100) == artefact.executable


@pytest.mark.parametrize("image", ["cpu", "cuda", "rocm"])
def test_images_carry_the_pinned_releases(image: str) -> None:
    text = (DEPLOY / "containers" / f"{image}.Dockerfile").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (ray,) = [entry for entry in project["dependencies"] if entry.startswith("ray==")]
    assert f"ray[default]=={ray.removeprefix('ray==')}" in text
    extras = project["optional-dependencies"][image]
    if image == "cpu":
        (torch,) = [entry for entry in extras if entry.startswith("torch==")]
        assert torch in text
    else:
        (vllm,) = [entry for entry in extras if entry.startswith("vllm==")]
        assert re.search(rf"^ARG BASE=\S+:v{re.escape(vllm.removeprefix('vllm=='))}$", text, re.MULTILINE)
    assert re.search(r"^USER megatoken$", text, re.MULTILINE), "no image runs as root"


def test_the_example_of_the_mixed_pool_finds_a_place() -> None:
    spec = load_spec((DEPLOY / "examples" / "kuberay.yaml").read_text())
    kube = launch_of(spec.launch).kuberay
    assert kube is not None
    entries = [
        NodeEntry(
            id=f"{group.name}-{{n}}",
            count=group.pods,
            devices=group.gpus or 0,
            device_kind=group.device_kind,
            device_memory_gib=group.device_memory_gib,
        )
        for group in kube.workers
    ]
    inventory = Inventory(tuple(node for entry in entries for node in entry.nodes()))
    llama = {
        "num_hidden_layers": 80, "hidden_size": 8192, "num_attention_heads": 64, "num_key_value_heads": 8,
        "vocab_size": 32000, "intermediate_size": 28672, "max_position_embeddings": 4096, "torch_dtype": "float16",
    }  # fmt: skip
    plan = plan_cluster(spec, inventory, {"llama-2-70b": read_shape(llama)})
    assert plan.complete
    assert not plan.unused


def test_the_spec_for_namespaces_stands_on_both_of_its_hosts() -> None:
    spec = load_spec((DEPLOY / "netns" / "two-nodes.yaml").read_text())
    hosts = tuple(Node(name, f"10.0.0.{last}", (Device("cpu", 0),)) for last, name in enumerate("ab", start=1))
    (model,) = plan_cluster(spec, Inventory(hosts), {}).models
    assert [rank.node for outcome in model.outcomes for rank in outcome.ranks] == ["a", "b"]
