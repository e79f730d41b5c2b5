"""A host's facts, as they travel through ssh; and what it is asked."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from megatoken.cluster.doctor.facts import Finding, Severity
from megatoken.cluster.doctor.host import facts_of
from megatoken.cluster.doctor.ssh_hosts import examination_steps
from megatoken.cluster.doctor.text import refusal_text
from megatoken.cluster.spec.load import parse_spec

HOST = [sys.executable, "-m", "megatoken.cluster.doctor.host"]


def ran(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*HOST, *words], capture_output=True, text=True, timeout=60, check=False)


def test_what_a_host_prints_is_read_back_with_its_clock() -> None:
    done = ran("--address", "127.0.0.1", "--source", "/nowhere/model")
    now = json.loads(done.stdout)["now"]
    facts = facts_of(done.stdout, now - 3.0, now - 1.0)
    assert facts.address == "127.0.0.1"
    assert facts.interface == "lo"
    assert facts.missing_sources == ("/nowhere/model",)
    assert facts.versions["ray"]
    assert facts.clock_offset_s == pytest.approx(2.0)
    assert facts.clock_error_s == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--address", "203.0.113.9"), "address: '203.0.113.9' is not allowed; this machine has:"),
        (("--address", "127.0.0.1", "--interface", "eth77"), "interface: 'eth77' is not allowed; one of"),
    ],
)
def test_an_address_or_interface_that_it_does_not_have_is_said(words: tuple[str, ...], said: str) -> None:
    done = ran(*words)
    assert done.returncode == 2
    assert done.stderr.startswith(said)


def test_a_host_is_asked_for_what_the_spec_wants_there() -> None:
    hosts = [{"host": "a", "address": "10.0.0.1", "gpus": 8}, {"host": "b", "interface": "ib0"}]
    spec = parse_spec(
        {"launch": {"ssh": {"hosts": hosts}}, "models": [{"name": "m", "source": "/data/my model", "replicas": 1}]}
    )
    first, second = (step.argv[-1] for step in examination_steps(spec))
    assert "--address 10.0.0.1 --gpus 8 --source '/data/my model'" in first
    assert "--port 7700" in first
    assert "--port 6379" in first
    assert "--address b --interface ib0" in second
    assert "--port" not in second


def test_a_refusal_says_what_stops_and_how_to_go_on() -> None:
    stop = Finding(Severity.STOP, "versions", "b", "ray differs", "Install ray 2.60.0 there.")
    text = refusal_text([stop, Finding(Severity.WARN, "limits", "c", "few files")])
    assert "--no-doctor" in text
    assert "b: ray differs" in text
    assert "few files" not in text
