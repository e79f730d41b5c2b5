"""`megatoken up` and `down` with launch.kuberay, against a stand-in for the API server and the operator."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

pytest.importorskip("kubernetes", reason="the extra megatoken[kubernetes] is not installed")

REPOSITORY = Path(__file__).resolve().parents[2]
SPEC = {
    "cluster": "k",
    "models": [{"name": "m", "engine": "simulated"}],
    "edge": {"count": 1, "port": 8000},
    "launch": {"kuberay": {"namespace": "fleet", "workers": [{"name": "gpu", "pods": 2}]}},
}
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[str]:
    command = [sys.executable, "-m", "tests.support.kubernetes_stand_in", *getattr(request, "param", ())]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def megatoken(tmp_path: Path, server: str) -> Run:
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "clusters": [{"name": "here", "cluster": {"server": server}}],
        "users": [{"name": "me", "user": {}}],
        "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me"}}],
    }
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(SPEC))
    env = {**os.environ, "KUBECONFIG": str(tmp_path / "kubeconfig"), "MEGATOKEN_STATE_DIR": str(tmp_path / "state")}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "megatoken.cluster.cli", *words]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=90, check=False)

    return run


def test_up_applies_follows_and_serves_and_down_leaves_nothing(megatoken: Run) -> None:
    up = megatoken("up", "-f", "spec.yaml")
    assert up.returncode == 0, up.stderr
    assert "ConfigMap megatoken-k-spec is applied in fleet" in up.stderr
    assert "RayCluster megatoken-k is applied in fleet" in up.stderr
    assert "gpu: Unschedulable" in up.stderr, "what holds a pod up is told while it does"
    assert "3 of 3 pods run" in up.stderr
    assert "clients use service/megatoken-k in fleet" in up.stderr
    assert megatoken("up", "-f", "spec.yaml").returncode == 0, "applied again, it is an update"
    down = megatoken("down")
    assert down.returncode == 0, down.stderr
    assert "cluster k is down" in down.stderr
    assert megatoken("down").returncode != 0, "nothing is known of it any more"


@pytest.mark.parametrize("server", [("--stuck",)], indirect=True)
def test_a_pod_that_finds_no_node_is_told_and_what_was_applied_stays_for_down(megatoken: Run) -> None:
    up = megatoken("up", "-f", "spec.yaml", "--timeout", "3")
    assert up.returncode == 1
    said = "RayCluster megatoken-k is not ready within 3 s: 1 of 3 pods run; gpu: Unschedulable: 0/3 nodes"
    assert said in up.stderr.splitlines()[-1]
    assert megatoken("down").returncode == 0


@pytest.mark.parametrize("server", [("--fail",)], indirect=True)
def test_a_cluster_that_the_operator_gives_up_is_an_error_at_once(megatoken: Run) -> None:
    up = megatoken("up", "-f", "spec.yaml")
    assert up.returncode == 1
    assert "RayCluster megatoken-k failed: 3 of 3 pods run; no image" in up.stderr.splitlines()[-1]


def test_without_a_server_there_is_one_line(megatoken: Run, tmp_path: Path) -> None:
    config = yaml.safe_load((tmp_path / "kubeconfig").read_text())
    config["clusters"][0]["cluster"]["server"] = "http://127.0.0.1:1"
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
    up = megatoken("up", "-f", "spec.yaml")
    assert up.returncode == 1
    assert "Kubernetes does not answer for its API:" in up.stderr.splitlines()[-1]
    (tmp_path / "kubeconfig").unlink()
    up = megatoken("up", "-f", "spec.yaml")
    assert up.returncode == 1
    assert "no Kubernetes cluster is configured" in up.stderr.splitlines()[-1]
