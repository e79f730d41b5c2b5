"""Status for people and for programs."""

import json

import pytest

from megatoken.cluster.client.progress import waiting_for
from megatoken.cluster.view.human import duration, number, table
from megatoken.cluster.view.json import status_document
from megatoken.cluster.view.text import status_text
from megatoken.v1 import control_pb2, throughput_pb2


def status() -> control_pb2.ClusterStatus:
    found = control_pb2.ClusterStatus(cluster="c", generation=2**40, controller="127.0.0.1:7700")
    found.nodes.add(node="alpha", address="10.0.0.1", state="alive", device_kind="cpu", devices=2, devices_used=1)
    found.models.add(model="m", wanted=2, ready=1, blocked="No room. Add a device.")
    found.replicas.add(
        replica="m-1", model="m", state="READY", engine="simulated", incarnation=2**60, ranks=["rank 0: alpha device 0"]
    )
    found.replicas.add(replica="m-0", model="m", state="FAILED", reason="killed by SIGKILL")
    found.processes.add(name="router-0.abc", kind="router", state="READY", address="127.0.0.1:7701")
    return found


def test_the_document_has_every_field_and_numbers_are_numbers() -> None:
    document = json.loads(json.dumps(status_document(status())))
    assert document["format"] == 1
    assert document["generation"] == 2**40
    assert document["replicas"][0]["incarnation"] == 2**60
    assert document["replicas"][1]["running"] == 0
    for message, entry in [
        (control_pb2.ReplicaStatus, document["replicas"][0]),
        (control_pb2.ModelStatus, document["models"][0]),
        (control_pb2.NodeStatus, document["nodes"][0]),
        (control_pb2.ProcessStatus, document["processes"][0]),
    ]:
        assert set(entry) == {field.name for field in message.DESCRIPTOR.fields}


def test_the_text_says_what_is_wrong_and_what_is_simulated() -> None:
    text = status_text(status())
    assert "m is blocked: No room. Add a device." in text
    assert "simulated (runs no model)" in text
    assert "killed by SIGKILL" in text


def test_what_the_engine_made_and_nobody_was_sent_has_a_column() -> None:
    found = status()
    for name, totals in {
        "m-1": throughput_pb2.Totals(made_tokens=50, generated_tokens=50),
        "m-0": throughput_pb2.Totals(made_tokens=50, generated_tokens=30, dropped_tokens=12),
    }.items():
        found.throughput.rows.add(kind="replica", name=name, workers=totals)
    found.replicas.add(replica="m-2", model="m", state="STARTING")
    lines = status_text(found).splitlines()
    (header,) = [line for line in lines if line.startswith("REPLICA")]
    column = header.index("UNDELIVERED")
    cells = {line.split()[0]: line[column : header.index("WHERE")].strip() for line in lines if line.startswith("m-")}
    assert cells == {"m-1": "0", "m-0": "20 (12 dropped)", "m-2": "-"}


def test_the_share_of_the_best_and_what_the_rest_is_lost_to() -> None:
    found = status()
    entry = found.efficiency.add(model="m", capacity_tokens_per_s=1000, tokens_per_s=700, held_back_by="idle")
    for cause, lost in {"ramp": 4.0, "idle": 200.0, "queue": 96.0}.items():
        entry.lost.add(cause=cause, tokens_per_s=lost)
    found.models.add(model="new", wanted=1)
    lines = status_text(found).splitlines()
    (row,) = [line for line in lines if line.startswith("m ") and "blocked" not in line]
    assert row.split()[5:] == ["70%", "idle", "20%,", "queue", "10%"]
    (row,) = [line for line in lines if line.startswith("new ")]
    assert row.split()[5:] == ["-", "-"]


def test_what_up_waits_for() -> None:
    found = status()
    assert waiting_for(found) == []  # blocked, and nothing on its way: no longer waited for
    found.models[0].blocked = ""
    assert waiting_for(found) == ["model m: 1 of 2 replicas ready"]
    found.replicas[0].state = "STARTING"
    found.processes[0].state = "FAILED"
    assert waiting_for(found) == ["model m: 0 of 2 replicas ready", "router router-0.abc: FAILED"]
    found.replicas[0].start_phase = "weights"
    assert waiting_for(found)[0] == "model m: 0 of 2 replicas ready (m-1: weights)"
    assert "weights" in status_text(found)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.9, "59 s"), (200, "3 min 20 s"), (7500, "2 h 5 min"), (273_600, "3 d 4 h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_numbers_and_tables() -> None:
    assert (number(1234.4), number(12.34), number(0)) == ("1,234", "12.3", "0")
    assert table(["A", "N"], [["x", "1"], ["long", "22"]]) == ["A      N", "x      1", "long  22"]
    assert table(["A"], []) == ["A"]
