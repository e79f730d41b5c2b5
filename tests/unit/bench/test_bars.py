"""Bars are found by their keys and judged on intervals; a page shows them with what the last runs reached."""

from __future__ import annotations

from typing import Any

import pytest

from tests.bench import all as bench_all
from tests.bench.bars import Bar, lines, number, rows, status

BARS = (Bar("session.tokens", 1000, True), Bar("ratio", 0.95, True, "over vLLM"), Bar("not.measured", 1, False))
FOUND: dict[str, Any] = {"session": {"tokens": 1200.0}, "ratio": {"low": 0.93, "median": 0.96, "high": 0.97}}


def test_what_was_measured_has_a_row_and_nothing_else() -> None:
    judged = rows(BARS, FOUND)
    assert [(row.bar.key, row.text, str(row.verdict)) for row in judged] == [
        ("session.tokens", "1,200", "met"),
        ("ratio", "0.96 (0.93 to 0.97)", "too noisy to tell"),
    ]
    assert " ".join(lines(judged)[1].split()) == "ratio 0.96 (0.93 to 0.97) at least 0.95 too noisy to tell over vLLM"


@pytest.mark.parametrize(
    ("tokens", "ratio", "code"), [(1200, 0.96, 0), (1200, 0.9, 1), (900, 0.96, 1), (900, None, 1), (1200, None, 3)]
)
def test_a_missed_bar_counts_more_than_a_noisy_one(tokens: int, ratio: float | None, code: int) -> None:
    found = {"session": {"tokens": tokens}, "ratio": FOUND["ratio"] if ratio is None else ratio}
    assert status(rows(BARS, found)) == code


@pytest.mark.parametrize(
    ("value", "text"), [(1_030_000.4, "1,030,000"), (0.7012, "0.701"), (123.45, "123.5"), (12.0, "12"), (0, "0")]
)
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text


def test_a_page_holds_every_row_and_the_last_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    one = bench_all.Benchmark("router", "<The router>", bench_all.RESULTS / "none.json", BARS)
    monkeypatch.setattr(bench_all, "BENCHMARKS", (one,))
    judged = {"router": rows(BARS, FOUND)}
    runs = [{"reached": {"router.ratio": 0.9 + number / 100}} for number in range(12)] + [bench_all.run_of(judged)]
    page = bench_all.page(judged, runs)
    assert "&lt;The router&gt;" in page
    assert page.count("<tr><td>") == 2
    past = page.split("<small>")[-1].split("</small>")[0].split(" · ")
    assert past == ["0.93", "0.94", "0.95", "0.96", "0.97", "0.98", "0.99", "1", "1.01", "0.96"], "the last ten"
    assert "0.96 (0.93 to 0.97)" in page
    assert "class=unknown>too noisy to tell" in page
    assert runs[-1]["reached"] == {"router.session.tokens": 1200.0, "router.ratio": 0.96}


def test_every_bar_has_a_key_of_its_own() -> None:
    for one in bench_all.BENCHMARKS:
        keys = [bar.key for bar in one.bars]
        assert len(keys) == len(set(keys)), one.name
