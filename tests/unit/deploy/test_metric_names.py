"""docs/metrics.md against what processes export, where that needs no process; tests/integration does the rest."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
from prometheus_client import generate_latest

from megatoken.cluster.controller.monitoring.metrics import ControllerMetrics
from megatoken.metrics import metrics_route, new_registry
from megatoken.router.edge.metrics import EdgeMetrics
from megatoken.v1.control_pb2 import ClusterStatus, ModelStatus
from megatoken.v1.tokens_pb2 import Finish
from tests.support.paths import REPOSITORY

CONTRACT = REPOSITORY / "docs" / "metrics.md"


def names(section: str) -> set[str]:
    """Names of one section of the contract."""
    (text,) = re.findall(rf"^## {section}.*?(?=^## |\Z)", CONTRACT.read_text(), re.MULTILINE | re.DOTALL)
    return set(re.findall(r"^\| `(megatoken_\w+)`", text, re.MULTILINE))


def edge() -> bytes:
    metrics = EdgeMetrics()
    metrics.started("chat")
    metrics.first_token("chat", 0.1)
    metrics.ended("chat", 1.0, Finish(generated_tokens=3))
    return metrics_route(metrics.registry, metrics.http_exposition)()[1]


def controller() -> bytes:
    registry = new_registry("controller")
    metrics = ControllerMetrics(registry)
    metrics.publish(ClusterStatus(cluster="c", models=[ModelStatus(model="m", wanted=1, blocked="needs 8 devices")]))
    metrics.record_tick(0.1)
    return generate_latest(registry)


@pytest.mark.parametrize(("section", "text"), [("Edge", edge()), ("Controller", controller())])
def test_a_process_exports_the_names_of_the_contract(section: str, text: bytes) -> None:
    shown = set(re.findall(r"^# TYPE (megatoken_\w+) ", text.decode(), re.MULTILINE))
    assert shown == names(section) | names("Every process")


@pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (Debian: apt-get install prometheus)"
)
@pytest.mark.parametrize("text", [edge(), controller()], ids=["edge", "controller"])
def test_promtool_accepts_it(text: bytes) -> None:
    ours = b"".join(line for line in text.splitlines(keepends=True) if b" http_" not in line and line[:5] != b"http_")
    result = subprocess.run(["promtool", "check", "metrics"], input=ours, capture_output=True, timeout=60, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_counters_of_the_contract_end_in_total_and_times_in_seconds() -> None:
    rows = re.findall(r"^\| `(megatoken_\w+)` \| (\w+) \|", CONTRACT.read_text(), re.MULTILINE)
    assert len(rows) > 90
    for name, kind in rows:
        assert (kind == "counter") == name.endswith("_total"), name
        assert kind in ("counter", "gauge", "histogram"), name
        if kind == "histogram":
            assert name.endswith(("_seconds", "_tokens")), name
        assert not re.search(r"_(ms|us|milliseconds|microseconds|percent|gib|mib)(_|$)", name), name
