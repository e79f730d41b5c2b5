"""deploy/prometheus: promtool accepts the configuration and the rules, and the rule tests hold every alert."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.support.paths import REPOSITORY

DIRECTORY = REPOSITORY / "deploy" / "prometheus"
RULES = ("recording_rules.yaml", "alerting_rules.yaml")
CONTRACT = REPOSITORY / "docs" / "metrics.md"

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (Debian: apt-get install prometheus)"
)


def promtool(*arguments: str, cwd: Path = DIRECTORY) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *arguments], cwd=cwd, capture_output=True, text=True, timeout=60, check=False)


def alerts() -> list[dict[str, object]]:
    groups = yaml.safe_load((DIRECTORY / "alerting_rules.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


@needs_promtool
def test_promtool_accepts_the_configuration_and_the_rules() -> None:
    for arguments in (("check", "config", "prometheus.yaml"), ("check", "rules", *RULES)):
        result = promtool(*arguments)
        assert result.returncode == 0, result.stdout + result.stderr


@needs_promtool
def test_the_rule_tests_pass() -> None:
    result = promtool("test", "rules", "rules_test.yaml")
    assert result.returncode == 0, result.stdout + result.stderr


@needs_promtool
def test_the_rule_tests_notice_each_alert_that_never_fires(tmp_path: Path) -> None:
    for path in DIRECTORY.glob("*.yaml"):
        shutil.copy(path, tmp_path)
    broken = yaml.safe_load((tmp_path / "alerting_rules.yaml").read_text())
    for group in broken["groups"]:
        for rule in group["rules"]:
            rule["expr"] = "vector(0) > 1"
    (tmp_path / "alerting_rules.yaml").write_text(yaml.safe_dump(broken))
    result = promtool("test", "rules", "rules_test.yaml", cwd=tmp_path)
    noticed = set(re.findall(r"alertname: (\w+)", result.stdout + result.stderr))
    assert noticed == {str(rule["alert"]) for rule in alerts()}


def test_every_alert_says_how_bad_it_is_and_what_to_do() -> None:
    for rule in alerts():
        assert rule["labels"] in ({"severity": "critical"}, {"severity": "warning"}), rule["alert"]
        assert set(rule["annotations"]) == {"summary", "description"}, rule["alert"]  # type: ignore[call-overload]


def test_rules_use_names_of_the_contract_only() -> None:
    known = set(re.findall(r"`(megatoken_[a-z0-9_]+)`", CONTRACT.read_text()))
    text = "\n".join((DIRECTORY / name).read_text() for name in RULES)
    recorded = re.findall(r"record: (\S+)", text)
    used = re.findall(r"(?<![a-z:_])megatoken_[a-z0-9_]+", re.sub(r"[a-z]+:megatoken_[a-z0-9_:]+", "", text))
    groups = set(re.findall(r"- name: (\S+)", text))
    plain = {re.sub(r"_(bucket|count|sum)$", "", name) for name in used} - groups
    assert plain <= known, plain - known
    for name in re.findall(r"[a-z]+:megatoken_[a-z0-9_:]+", text):
        assert name in recorded, f"{name} is used and never recorded"
