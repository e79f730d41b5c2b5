"""The last hours in figures: what is summed, what is a mean, what is not known, and a page that is one file."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from megatoken.cluster.cli.look.report import prices_of, seconds_of
from megatoken.cluster.client.control import CommandError
from megatoken.cluster.view.report.page import report_page
from megatoken.cluster.view.report.summary import Summary, summary_of
from megatoken.cluster.view.report.text import report_text
from megatoken.v1 import control_pb2

NAME = "chat<script>"


def history() -> control_pb2.History:
    found = control_pb2.History()
    for minute, (rate, seconds) in enumerate(((100.0, 60.0), (400.0, 120.0))):
        at = 1000.0 + 60 * minute
        found.points.add(unix_s=at, seconds=seconds, resumed=2, refused=minute)
        point = found.points.add(
            unix_s=at, seconds=seconds, model=NAME, tokens_per_s=rate, capacity_tokens_per_s=500.0, ready=2, wanted=2
        )
        point.lost.add(cause="idle", tokens_per_s=500.0 - rate)
        point.device_seconds["mi355x"] = 16 * seconds
        point.counted.generated_tokens = int(rate * seconds)
        point.counted.requests_finished = 3
    found.events.add(
        unix_s=1005.0,
        kind="replica.state",
        subject="chat-1",
        message="STARTING -> READY: after 9.0 s (place 1.0, import 8.0)",
        fields={"to": "READY", "why": "after 9.0 s (place 1.0, import 8.0)"},
    )
    found.events.add(
        unix_s=1010.0, kind="replica.state", subject="chat-0", fields={"to": "FAILED", "why": "killed by SIGKILL"}
    )
    found.events.add(unix_s=1011.0, kind="model.scaled", subject="chat")
    return found


def summary(**prices: float) -> Summary:
    status = control_pb2.ClusterStatus(cluster="demo", unix_s=1200.0)
    status.nodes.add(node="alpha", devices_out=["3: cordoned: its fan is loud"])
    return summary_of(history(), status, 3600.0, prices)


def clock(unix_s: float) -> str:
    return f"t{unix_s:.0f}"


def test_counts_are_summed_and_rates_are_means_over_time() -> None:
    found = summary()
    (model,) = found.models
    assert (model.generated_tokens, model.finished) == (54_000, 6)
    assert (model.tokens_per_s, model.capacity, model.share_of_best) == (300.0, 500.0, 0.6)
    assert model.lost == {"ramp": 0.0, "idle": 200.0, "imbalance": 0.0, "queue": 0.0}
    assert model.device_hours == {"mi355x": pytest.approx(0.8)}
    assert (found.failovers, found.refused, found.covered_s) == (4, 1, 180.0)
    assert found.starts == ((1005.0, "chat-1", "after 9.0 s (place 1.0, import 8.0)"),)
    assert found.failures == ((1010.0, "chat-0", "killed by SIGKILL"),)
    assert found.devices_out == ("alpha 3: cordoned: its fan is loud",)


def test_cost_needs_the_price_of_every_kind_and_energy_a_device_that_tells() -> None:
    (model,) = summary().models
    assert (model.cost, model.cost_per_million, model.joules, model.tokens_per_joule) == (None, None, None, None)
    (model,) = summary(mi355x=5.0).models
    assert model.cost == pytest.approx(4.0)
    assert model.cost_per_million == pytest.approx(4.0 / 0.054)


def test_the_page_of_text_says_it_all() -> None:
    text = report_text(summary(mi355x=5.0), clock)
    for said in (
        "t1200",
        "54,000",
        "mi355x 0.80",
        "60%",
        "40%",
        "ready after 9.0 s",
        "killed by SIGKILL",
        "fan is loud",
    ):
        assert said in text
    empty = summary_of(control_pb2.History(), control_pb2.ClusterStatus(cluster="new"), 60.0, {})
    assert "cluster new" in report_text(empty, clock)


def test_the_html_page_is_one_file_and_runs_nothing() -> None:
    page = report_page(summary(), clock)
    assert "<script" not in page
    assert NAME.replace("<", "&lt;").replace(">", "&gt;") in page
    assert re.search(r"(src|href)=|url\(", page) is None, "it needs nothing from elsewhere"
    (plot,) = re.findall(r"<svg.*?</svg>", page)
    lines = [entry for entry in ElementTree.fromstring(plot) if entry.tag == "polyline"]
    assert [entry.get("class") for entry in lines] == ["best", "rate"]
    assert all(len((entry.get("points") or "").split()) == 2 for entry in lines)


@pytest.mark.parametrize(("text", "seconds"), [("90m", 5400.0), ("1h", 3600.0), ("7d", 604_800.0)])
def test_times(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "1", "0h", "h", "1w", "-1h", "1.5h"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(CommandError, match=r"--since: .* is not allowed"):
        seconds_of(text)


def test_prices() -> None:
    assert prices_of(["mi355x=4.2", "cpu=0"]) == {"mi355x": 4.2, "cpu": 0.0}
    for text in ("mi355x", "=3", "cpu=x", "cpu=-1"):
        with pytest.raises(CommandError, match=r"--price: .* is not allowed"):
            prices_of([text])
