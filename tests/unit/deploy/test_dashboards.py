"""deploy/grafana: the JSON is what the generator writes, hangs together, and asks for metrics that exist."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import pytest

from tests.support.paths import REPOSITORY

FILES = sorted((REPOSITORY / "deploy" / "grafana" / "dashboards").glob("*.json"))
KNOWN = set(re.findall(r"`(megatoken_[a-z0-9_]+)`", (REPOSITORY / "docs" / "metrics.md").read_text()))
PROCESS_METRICS = {"process_cpu_seconds_total", "process_resident_memory_bytes", "process_open_fds", "up"}


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def dashboard(request: pytest.FixtureRequest) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(request.param.read_text())
    return loaded


def expressions(dashboard: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]


def test_what_is_committed_is_what_the_generator_writes() -> None:
    command = [sys.executable, str(REPOSITORY / "deploy" / "grafana" / "generate"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr


def test_the_five_dashboards_are_there() -> None:
    assert [path.stem for path in FILES] == ["fleet", "model", "node", "replica", "router"]


def test_panels_have_places_and_ids_of_their_own(dashboard: dict[str, Any]) -> None:
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells


def test_queries_ask_for_metrics_of_the_contract(dashboard: dict[str, Any]) -> None:
    for expression in expressions(dashboard):
        names = re.findall(r"\b(?:megatoken|process)_[a-z0-9_]+|\bup\b", expression)
        assert names, expression
        for name in names:
            plain = re.sub(r"_(bucket|count|sum)$", "", name)
            assert plain in KNOWN | PROCESS_METRICS, f"{plain} in {expression}"


def test_every_query_is_of_the_chosen_cluster_and_every_variable_is_declared(dashboard: dict[str, Any]) -> None:
    declared = {variable["name"] for variable in dashboard["templating"]["list"]}
    for expression in expressions(dashboard):
        assert 'cluster="$cluster"' in expression
        assert not re.search(r"@[CMRPN]\b", expression)
        assert set(re.findall(r"\$(\w+)", expression)) - {"__rate_interval"} <= declared
