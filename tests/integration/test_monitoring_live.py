"""Monitoring of a real cluster under real traffic: /sd, every process's metrics, Prometheus, Grafana's queries, `top`.

One cluster on a local Ray, with simulated engines that are named so everywhere; one Prometheus that knows nothing but
the controller's /sd. Tests run in order and share both; the last ones change the cluster.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml

from tests.support.clusters import RunningCluster, running
from tests.support.processes import REPOSITORY
from tests.support.prometheus import MISSING, Server
from tests.support.terminal import Terminal

GRAFANA = REPOSITORY / "deploy" / "grafana"
RATE_INTERVAL = "15s"
SETTLE_S = 60.0
SPEC = {
    "cluster": "watched",
    "control": {"port": 0},
    "routers": {"port": 0},
    "edge": {"count": 0},
    "models": [
        {
            "name": "chat",
            "engine": "simulated",
            "replicas": 2,
            "simulated": {"decode_tokens_per_s": 1500, "max_running": 32},
            "standalone_tokens_per_s": {"cpu": 1500},
        },
        {
            "name": "code",
            "engine": "simulated",
            "simulated": {"decode_tokens_per_s": 800, "max_running": 16},
            "standalone_tokens_per_s": {"cpu": 800},
        },
    ],
    "ray": {"cpu_devices": 5},
}

# Names of the contract that a simulated cluster at rest has no reason to show.
NOT_HERE = {
    "megatoken_worker_energy_joules_total",  # no device reports it
    "megatoken_throughput_energy_joules_total",
    "megatoken_cluster_model_blocked",  # nothing is
}

needs_prometheus = pytest.mark.skipif(bool(MISSING), reason=MISSING)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    """Under traffic from the first test to the last."""
    with running(tmp_path_factory.mktemp("watched"), SPEC) as started:
        models = [str(model["name"]) for model in SPEC["models"]]  # type: ignore[attr-defined]
        command = [sys.executable, "-m", "tests.support.traffic", started.address("router"), *models]
        traffic = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
        assert traffic.stdout is not None
        assert traffic.stdout.readline() == "busy\n"
        yield started
        traffic.kill()
        traffic.wait()


@pytest.fixture(scope="module")
def prometheus(cluster: RunningCluster) -> Iterator[Server]:
    server = Server(cluster.directory / "prometheus", cluster.status()["metrics_address"])
    yield server
    server.stop()


def targets(cluster: RunningCluster) -> list[dict[str, Any]]:
    with urllib.request.urlopen(f"http://{cluster.status()['metrics_address']}/sd", timeout=10) as answer:
        found: list[dict[str, Any]] = json.load(answer)
    return found


def exposition(target: dict[str, Any]) -> str:
    with urllib.request.urlopen(f"http://{target['targets'][0]}/metrics", timeout=10) as answer:
        text: str = answer.read().decode()
    return text


def contract() -> dict[str, set[str]]:
    """Names by section of docs/metrics.md."""
    sections = re.split(r"^## ", (REPOSITORY / "docs" / "metrics.md").read_text(), flags=re.MULTILINE)[1:]
    return {
        section.splitlines()[0].split(",")[0]: set(re.findall(r"^\| `(megatoken_\w+)`", section, re.MULTILINE))
        for section in sections
    }


def eventually(met: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + SETTLE_S
    while True:
        try:
            found, problem = met(), ""
        except (OSError, KeyError) as error:
            found, problem = None, str(error)
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {SETTLE_S:g} s {problem}")
        time.sleep(0.25)


def test_sd_lists_every_process_with_its_labels(cluster: RunningCluster) -> None:
    found = {target["labels"]["process"]: target["labels"] for target in targets(cluster)}
    kinds = sorted(labels["kind"] for labels in found.values())
    assert kinds == ["agent", "controller", "router", "worker", "worker", "worker"]
    for labels in found.values():
        assert labels["cluster"] == "watched"
        assert ("node" in labels) == (labels["kind"] != "controller")
        if labels["kind"] == "worker":
            assert labels["engine"] == "simulated"
            assert (labels["model"], labels["replica"]) == (labels["process"].rsplit("-", 1)[0], labels["process"])


@needs_prometheus
def test_promtool_accepts_every_processs_metrics(cluster: RunningCluster) -> None:
    for target in targets(cluster):
        command = ["promtool", "check", "metrics"]
        text = exposition(target)
        result = subprocess.run(command, input=text, capture_output=True, text=True, timeout=30, check=False)
        assert result.returncode == 0, f"{target['labels']}\n{result.stdout}{result.stderr}"


def test_names_are_those_of_the_contract_and_none_is_missing(cluster: RunningCluster) -> None:
    sections = contract()
    common = sections["Every process"]
    expected = {
        "controller": (sections["Controller"], set()),
        "worker": (sections["Worker"], set()),
        "router": (sections["Router"] | sections["Throughput"], set()),
        "agent": (sections["Agent"] | sections["Throughput"], set()),
    }
    assert all(names for names, _ in expected.values())
    for target in targets(cluster):
        must, may = expected[target["labels"]["kind"]]
        shown = set(re.findall(r"^# TYPE (megatoken_\w+) ", exposition(target), re.MULTILINE))
        unknown = shown - must - may - common
        assert not unknown, f"{target['labels']}: not in docs/metrics.md: {unknown}"
        missing = (must | common) - shown - NOT_HERE
        assert not missing, f"{target['labels']}: {missing}"


@needs_prometheus
def test_prometheus_finds_and_scrapes_every_process(cluster: RunningCluster, prometheus: Server) -> None:
    listed = {target["labels"]["process"] for target in targets(cluster)}
    eventually(lambda: prometheus.up() == listed, f"{listed} scraped")


def panels() -> list[tuple[str, str, str]]:
    """(dashboard, panel, expression) of every query; panels that are empty when all is well are left out."""
    rare = {
        (board["title"], panel["title"])
        for board in yaml.safe_load((GRAFANA / "dashboards.yaml").read_text())["dashboards"]
        for row in board["rows"]
        for panel in row["panels"]
        if panel.get("rare")
    }
    found = []
    for path in sorted((GRAFANA / "dashboards").glob("*.json")):
        board = json.loads(path.read_text())
        for panel in board["panels"]:
            for target in panel.get("targets", []):
                if (board["title"], panel["title"]) not in rare:
                    found.append((board["title"], panel["title"], target["expr"]))
    return found


def filled(expression: str) -> str:
    """As Grafana sends it, with "All" chosen."""
    values = {"cluster": "watched", "__rate_interval": RATE_INTERVAL}
    return re.sub(r"\$(\w+)", lambda match: values.get(match[1], ".*"), expression)


@needs_prometheus
def test_every_query_of_every_dashboard_returns_data(cluster: RunningCluster, prometheus: Server) -> None:
    asked = panels()
    assert len(asked) > 80

    def empty() -> list[tuple[str, str, str]]:
        return [
            query
            for query in asked
            if not any(math.isfinite(float(series["value"][1])) for series in prometheus.query(filled(query[2])))
        ]

    last: list[Any] = []

    def none_empty() -> bool:
        last[:] = empty()
        return not last

    try:
        eventually(none_empty, "data in every panel")
    except AssertionError as error:
        raise AssertionError("\n".join(map(str, last))) from error


@needs_prometheus
def test_every_variable_of_every_dashboard_has_values(prometheus: Server) -> None:
    for path in sorted((GRAFANA / "dashboards").glob("*.json")):
        for variable in json.loads(path.read_text())["templating"]["list"]:
            if variable["type"] != "query":
                continue
            match = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["definition"])
            assert match is not None
            series = prometheus.query(f"count by ({match[2]}) ({filled(match[1])})")
            assert [one["metric"][match[2]] for one in series], variable["definition"]


@needs_prometheus
def test_rules_evaluate_and_a_healthy_cluster_raises_no_alert(prometheus: Server) -> None:
    groups = prometheus.ask("rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) > 30
    assert {rule["health"] for rule in rules} == {"ok"}, [rule for rule in rules if rule["health"] != "ok"]
    firing = [rule["name"] for rule in rules if rule.get("state") == "firing"]
    assert firing == []
    recorded = {rule["name"] for rule in rules if rule["type"] == "recording"}
    quiet = {"model:megatoken_router_error:ratio5m"}
    for name in recorded - quiet:
        eventually(lambda name=name: prometheus.query(name), f"a record of {name}")  # type: ignore[misc]


@needs_prometheus
def test_independent_counts_of_the_rate_agree(prometheus: Server) -> None:
    """The collective's sum, the workers' own counters and the router's, each scraped from another process."""

    def rates() -> list[float]:
        parts = (
            'max(rate(megatoken_throughput_generated_tokens_total{scope="cluster", ledger="workers"}[20s]))',
            "sum(rate(megatoken_worker_generated_tokens_total[20s]))",
            "sum(rate(megatoken_router_generated_tokens_total[20s]))",
        )
        return [float(series["value"][1]) for part in parts for series in prometheus.query(part)]

    def agree() -> bool:
        found = rates()
        return len(found) == 3 and min(found) > 100 and max(found) < 1.1 * min(found)

    try:
        eventually(agree, "three counts that agree")
    except AssertionError as error:
        raise AssertionError(f"collective, workers, routers: {rates()}") from error


def test_events_are_json_lines_with_cause_and_ids(cluster: RunningCluster) -> None:
    events = [json.loads(line) for line in cluster.run("events", "--json").splitlines()]
    sequences = [event["sequence"] for event in events]
    assert sequences == sorted(set(sequences))
    ready = [event for event in events if event["kind"] == "replica.state" and "READY" in event["message"]]
    assert {event["subject"].rsplit("-", 1)[0] for event in ready} == {"chat", "code"}
    assert all(event["cause"] for event in ready)


def test_every_log_line_of_every_process_is_json(cluster: RunningCluster) -> None:
    names = ["", *(row["replica"] for row in cluster.status()["replicas"])]
    names += [row["name"] for row in cluster.status()["processes"]]
    for name in names:
        lines = cluster.run("logs", *([name] if name else [])).splitlines()
        for line in lines:
            entry = json.loads(line)
            assert {"ts", "level", "logger", "event", "process"} <= set(entry), line


def test_top_draws_a_picture_of_the_running_cluster(cluster: RunningCluster) -> None:
    picture = cluster.directory / "top.svg"
    cluster.run("top", "--svg", str(picture), "--after", "4", "--size", "100x30")
    text = picture.read_text().replace("&#160;", " ")
    assert "@font-face" not in text  # nothing is fetched to look at it
    for expected in ("watched", "SIMULATED", "tok/s", "chat-", "code-", "efficiency"):
        assert expected in text, expected


@pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed (Debian: apt-get install tmux)")
def test_top_scales_and_drains_the_running_cluster(cluster: RunningCluster, request: pytest.FixtureRequest) -> None:
    command = f"cd {REPOSITORY} && {sys.executable} -m megatoken.cluster.cli top; echo left: $?; cat"
    code = cluster.ready("code")[0]
    with Terminal(command, env=cluster.env) as terminal:
        screen = terminal.wait_for(code, "tok/s", "p50/p90/p99")
        assert "SIMULATED" in screen.splitlines()[0]
        terminal.press("-l", "/code")
        terminal.press("Enter")
        terminal.wait_for("filter 'code'", "s sort", gone="chat-1 ")  # its row; an event of it may be shown still
        terminal.press("+")
        terminal.wait_for("Scale code from 1 to 2 replicas?")
        terminal.press("y")
        cluster.wait(lambda _status: len(cluster.ready("code")) == 2, timeout_s=90)
        names = cluster.ready("code")
        terminal.press("d")
        terminal.wait_for(f"Drain {code}?")
        terminal.press("y")
        cluster.wait(lambda _status: code not in cluster.ready("code"))
        terminal.press("q")
        terminal.wait_for("left: 0")
    if shutil.which("prometheus") is None:
        return
    server: Server = request.getfixturevalue("prometheus")
    (new,) = set(names) - {code}
    eventually(lambda: new in server.up(), f"{new} scraped")
    eventually(lambda: code not in server.up(), f"{code} gone")
