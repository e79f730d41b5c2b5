"""What a worker exports is what docs/metrics.md says, by name, type and label, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatoken.errors import AuthError, ForbiddenError, OverloadError, RequestError, UnavailableError
from megatoken.worker.config import WorkerConfig
from megatoken.worker.engines.engine import EngineFacts, EngineLoad
from megatoken.worker.measures import REFUSALS, WorkerMeasures
from megatoken.worker.metrics import WorkerCollector
from megatoken.worker.replica import RunningReplica
from megatoken.worker.totals import open_counters

CONTRACT = Path(__file__).parents[3] / "docs" / "metrics.md"
ABSENT_HERE = {"megatoken_worker_energy_joules_total"}  # only where the device reports it


class NoEngine:
    load = EngineLoad(running=3, kv_usage=0.5)


@pytest.fixture
def collector(tmp_path: Path) -> WorkerCollector:
    config = WorkerConfig(replica="r", model="m", engine="simulated", simulated={}, counters_dir=str(tmp_path))
    replica = RunningReplica(config, NoEngine(), open_counters(config).totals, WorkerMeasures(), print)  # type: ignore[arg-type]
    replica.facts = EngineFacts("simulated", "1", 100, 1000, 8, 16, 10_000)
    return WorkerCollector(replica)


def promised() -> dict[str, tuple[str, set[str]]]:
    rows = re.findall(r"^\| `(megatoken_worker_\w+)` \| (\w+) \|([^|]*)\|", CONTRACT.read_text(), re.MULTILINE)
    return {name: (kind, label_names(text)) for name, kind, text in rows}


def label_names(text: str) -> set[str]:
    """`outcome` and `reason: a, b` each name one label."""
    parts = [part for part in text.strip().split(", ") if not part.startswith("`")]
    return {part.partition(":")[0].strip() for part in parts} - {""}


def test_names_types_and_labels_are_the_contracts(collector: WorkerCollector) -> None:
    exported = {}
    for family in collector.collect():
        name = family.name + ("_total" if family.type == "counter" else "")
        labels = {label for sample in family.samples for label in sample.labels} - {"model", "replica", "engine", "le"}
        exported[name] = (family.type, labels)
        assert all(sample.labels["engine"] == "simulated" for sample in family.samples)
    contract = promised()
    assert set(exported) == set(contract) - ABSENT_HERE
    for name, (kind, labels) in exported.items():
        assert (name, kind, labels) == (name, *contract[name])


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RequestError("prompt", [], "at least one token id"), "invalid"),
        (OverloadError("full", 1.0), "full"),
        (AuthError("a lease is needed"), "unauthenticated"),
        (ForbiddenError("lease: it was used already"), "unauthenticated"),
        (UnavailableError("it drains"), "draining"),
        (KeyError("x"), "fault"),
    ],
)
def test_each_refusal_counts_for_its_reason(error: Exception, reason: str) -> None:
    measures = WorkerMeasures()
    measures.refused(error)
    assert {name: count for name, count in measures.refusals.items() if count} == {reason: 1}


def test_the_reasons_of_refusals_are_the_contracts() -> None:
    row = re.search(r"`megatoken_worker_refusals_total`.*reason: ([^|]*) \|", CONTRACT.read_text())
    assert row is not None
    assert set(re.findall(r"`(\w+)`", row.group(1))) == set(REFUSALS)
