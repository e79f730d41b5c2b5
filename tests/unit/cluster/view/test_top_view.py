"""cluster/view/top/view.py: what `megatoken top` shows for which inputs."""

from __future__ import annotations

import dataclasses

import pytest

from megatoken.cluster.view.top.text import age, compact, milliseconds, percent, sparkline, whole
from megatoken.cluster.view.top.view import (
    MODEL_COLUMNS,
    REPLICA_COLUMNS,
    REPLICA_SORTS,
    Inputs,
    columns_for,
    event_line,
    header,
    model_rows,
    replica_rows,
)
from megatoken.v1.control_pb2 import ClusterStatus, Event, ModelStatus, NodeStatus, ReplicaStatus
from megatoken.v1.router_pb2 import RouterStatus
from megatoken.v1.throughput_pb2 import ThroughputRow, ThroughputSample, Window


def replica(name: str, state: str = "READY", rate: float = 0.0, **more: object) -> ReplicaStatus:
    return ReplicaStatus(replica=name, model="chat", state=state, engine="vllm", generated_tokens_per_s=rate, **more)


def inputs(**changes: object) -> Inputs:
    status = ClusterStatus(
        cluster="demo",
        generation=2,
        nodes=[NodeStatus(node="a", state="alive"), NodeStatus(node="b", state="dead")],
        models=[ModelStatus(model="chat", wanted=3, ready=2, running=5, waiting=1, generated_tokens_per_s=250.0)],
        replicas=[
            replica("chat-2", "STARTING", node="b"),
            replica("chat-0", rate=100.0, node="a", kv_usage=0.9),
            replica("chat-1", rate=150.0, node="b", kv_usage=0.1, waiting=4),
        ],
    )
    return dataclasses.replace(Inputs(status=status, history=(1.0, 2.0)), **changes)


SAMPLE = ThroughputSample(
    ranks=2,
    complete=True,
    rows=[
        ThroughputRow(
            kind="cluster",
            efficiency=0.934,
            windows=[Window(seconds=1, generated_tokens_per_s=1_042_110.4, prompt_tokens_per_s=2000.0)],
        ),
        ThroughputRow(kind="replica", name="chat-0", windows=[Window(seconds=10, generated_tokens_per_s=120.0)]),
    ],
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((None, "-"), (0.0, "0"), (7.25, "7.2"), (9.99, "10"), (950.0, "950"), (999.6, "1.00k"), (12_345.0, "12.3k")),
        *((999_400.0, "999k"), (1_042_110.0, "1.04M"), (99_960_000.0, "100M"), (3e9, "3.00G"), (2e12, "2.00T")),
    ],
)
def test_compact_numbers_fit_six_characters(value: float | None, text: str) -> None:
    assert compact(value).replace("10.0", "10") == text
    assert len(compact(value)) <= 6


def test_text_of_times_and_shares() -> None:
    assert [age(seconds) for seconds in (-1, 42, 90, 7300, 200_000)] == ["0s", "42s", "1m", "2h", "2d"]
    assert [milliseconds(value) for value in (4.27, 640.4, 12_500)] == ["4.3ms", "640ms", "12.5s"]
    assert (percent(0.934), percent(None), whole(1_042_110.4), whole(None)) == ("93%", "-", "1,042,110", "-")


def test_sparkline_scales_from_zero_and_keeps_the_newest() -> None:
    assert sparkline([0, 0], 5) == "▁▁"
    assert sparkline([9, 0, 4, 8], 3) == "▁▅█"
    assert sparkline([], 5) == sparkline([1.0], 0) == ""


def test_header_takes_the_collectives_rate_and_says_who_is_simulated() -> None:
    head = header(inputs(sample=SAMPLE), 80)
    assert head.rate == "1,042,110 tok/s"
    assert "efficiency 93%" in head.lines[0]
    assert "prefill 2.00k/s" in head.lines[0]
    assert "replicas 2/3   nodes 1/2   running 5   waiting 1" in head.lines[2]
    assert "SIMULATED" not in head.title
    fleet = inputs()
    fleet.status.replicas[0].engine = "simulated"
    assert "partly SIMULATED" in header(fleet, 80).title
    for entry in fleet.status.replicas:
        entry.engine = "simulated"
    assert header(fleet, 80).title.split("  ")[2] == "SIMULATED"


def test_header_without_a_sample_uses_the_models_rates_and_shows_no_zero_it_does_not_know() -> None:
    head = header(inputs(), 80)
    assert head.rate == "250 tok/s"
    assert head.lines[0].startswith("efficiency -   10s -")
    assert header(Inputs(), 80).rate == "- tok/s"
    assert header(Inputs(), 80).lines[1] == "TTFT -   ITL -"


def test_latencies_are_those_of_the_worst_router() -> None:
    routers = {
        "a": RouterStatus(ttft_ms=[5, 9, 20], itl_ms=[1, 2, 3], ceiling=0.99),
        "b": RouterStatus(ttft_ms=[4, 10, 640], itl_ms=[0, 0, 0], ceiling=0.9, held_back_by="imbalance"),
        "idle": RouterStatus(),
    }
    head = header(inputs(routers=routers), 80)
    assert head.lines[1] == "TTFT 5.0ms / 10ms / 640ms p50/p90/p99   ITL 1.0ms / 2.0ms / 3.0ms p50/p90/p99"
    assert head.lines[2].endswith("ceiling 90% (imbalance)")


def test_the_first_thing_to_know_is_the_warning() -> None:
    assert header(inputs(), 80).warning == ""
    incomplete = ThroughputSample(ranks=2, complete=False, incomplete_reason="rank 1 left")
    assert header(inputs(sample=incomplete), 80).warning == "throughput incomplete: rank 1 left"
    blocked = inputs(sample=incomplete)
    blocked.status.models[0].blocked = "needs 8 devices"
    assert header(blocked, 80).warning == "blocked  chat: needs 8 devices"
    gone = dataclasses.replace(blocked, unreachable_s=75.0, reason="connection refused")
    assert header(gone, 80).warning == "controller unreachable for 1m, what is below is old: connection refused"


def test_replicas_sort_by_each_key_and_reverse() -> None:
    def ids(**how: object) -> list[str]:
        return [row.key[-1] for row in replica_rows(inputs(sample=SAMPLE), **how)]  # type: ignore[arg-type]

    assert ids() == ["0", "1", "2"]
    assert ids(reverse=True) == ["2", "1", "0"]
    assert ids(sort="rate") == ["1", "0", "2"]
    assert ids(sort="rate", reverse=True) == ["2", "0", "1"]
    assert ids(sort="state") == ["2", "0", "1"]
    assert ids(sort="waiting") == ["1", "0", "2"]
    assert ids(sort="node") == ["0", "1", "2"]
    for key in REPLICA_SORTS:
        assert len(ids(sort=key)) == 3


def test_replicas_are_filtered_by_what_is_seen() -> None:
    assert [row.key for row in replica_rows(inputs(), find="START")] == ["chat-2"]
    assert len(replica_rows(inputs(), find="chat")) == 3
    assert replica_rows(inputs(), find="nothing") == []


def test_a_replica_that_does_not_serve_shows_no_load() -> None:
    rows = {row.key: row.cells for row in replica_rows(inputs(sample=SAMPLE))}
    assert [rows["chat-2"][key] for key in ("rate", "running", "kv")] == ["-", "-", "-"]
    assert [rows["chat-0"][key] for key in ("rate", "kv")] == ["120", "90%"]  # the collective's 10 s window
    assert rows["chat-1"]["rate"] == "150"  # no row in the sample: the controller's figure


def test_model_rows_say_what_is_wrong() -> None:
    (row,) = model_rows(inputs())
    assert (row.cells["ready"], row.cells["note"], row.state) == ("2/3", "", "STARTING")
    blocked = inputs()
    blocked.status.models[0].blocked = "needs 8 devices"
    blocked.status.models[0].ready = 0
    (row,) = model_rows(blocked)
    assert (row.cells["note"], row.state) == ("blocked: needs 8 devices", "FAILED")


@pytest.mark.parametrize("columns", [REPLICA_COLUMNS, MODEL_COLUMNS])
@pytest.mark.parametrize("width", [80, 100, 120, 200])
def test_columns_fit_the_terminal(columns: tuple, width: int) -> None:  # type: ignore[type-arg]
    shown = columns_for(columns, width)
    assert sum(column.width + 2 for column in shown) <= width - 1  # a cell of padding each side, one of scroll bar
    assert len(columns_for(columns, width)) <= len(columns_for(columns, 300))


def test_every_row_has_every_column_and_sort_key() -> None:
    (row, *_) = replica_rows(inputs())
    assert {column.key for column in REPLICA_COLUMNS} <= set(row.cells)
    assert set(REPLICA_SORTS) <= set(row.sort)
    assert {column.key for column in MODEL_COLUMNS} <= set(model_rows(inputs())[0].cells)


def test_event_lines() -> None:
    event = Event(unix_s=5.0, kind="replica.state", subject="chat-0", message="READY -> FAILED", cause="engine died")
    assert event_line(event, lambda unix_s: f"t{unix_s:.0f}") == "t5  chat-0: READY -> FAILED (engine died)"
    assert event_line(Event(kind="controller.started"), lambda _unix_s: "t") == "t  controller.started"
