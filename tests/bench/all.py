"""`make bench-all`: every benchmark, and one page: what each bar asks for, what was reached, what the last runs were.

    python -m tests.bench.all [--only NAME ...] [--page-only]

Writes bench-results/index.html and adds a line to bench-results/history.jsonl. Exits as its worst benchmark does.
"""

from __future__ import annotations

import argparse
import html
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench import autoscale, plan, router, serving, throughput
from tests.bench.bars import Bar, Row, rows
from tests.bench.pairs import Verdict

RESULTS = Path("bench-results")
HISTORY, PAGE = RESULTS / "history.jsonl", RESULTS / "index.html"
SHOWN_RUNS = 10
LIMIT_S = 2400
STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; margin: 2em auto; max-width: 72em; padding: 0 1em; }
table { border-collapse: collapse; width: 100%; } td, th { text-align: left; padding: .3em .8em .3em 0; }
tr { border-top: 1px solid #8884; } .met { color: #1a7f37; } .missed { color: #cf222e; font-weight: 600; }
.unknown { color: #9a6700; } small { color: #888; }
@media (prefers-color-scheme: dark) { body { background: #111; color: #ddd; } }
"""


@dataclass(frozen=True)
class Benchmark:
    """A module with RESULTS and BARS."""

    name: str
    title: str
    results: Path
    bars: tuple[Bar, ...]

    def found(self) -> dict[str, Any]:
        try:
            read: dict[str, Any] = json.loads(self.results.read_text())
        except FileNotFoundError:
            return {}
        return read


BENCHMARKS = (
    Benchmark("serving", "A fleet of real vLLM against vLLM alone", serving.RESULTS, serving.BARS),
    Benchmark("router", "The router: CPU a token and a request", router.RESULTS, router.BARS),
    Benchmark("plan", "Placement", plan.RESULTS, plan.BARS),
    Benchmark("throughput", "The collective", throughput.RESULTS, throughput.BARS),
    Benchmark("autoscale", "Autoscaling on traces (simulated)", autoscale.RESULTS, autoscale.BARS),
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.all")
    parser.add_argument("--only", nargs="*", choices=[one.name for one in BENCHMARKS], default=None)
    parser.add_argument("--page-only", action="store_true", help="write the page of the results that are there")
    asked = parser.parse_args()
    worst = 0
    for one in BENCHMARKS:
        if asked.page_only or (asked.only is not None and one.name not in asked.only):
            continue
        began = time.monotonic()
        print(f"== {one.title}", flush=True)
        done = subprocess.run([sys.executable, "-m", f"tests.bench.{one.name}"], timeout=LIMIT_S, check=False)
        print(f"== {one.name}: {time.monotonic() - began:.0f} s", flush=True)
        worst = max(worst, done.returncode, key=lambda code: (code == 1, code))
    judged = {one.name: rows(one.bars, one.found()) for one in BENCHMARKS}
    runs = [json.loads(line) for line in HISTORY.read_text().splitlines()] if HISTORY.exists() else []
    if not asked.page_only:
        runs.append(run_of(judged))
        with HISTORY.open("a") as file:
            file.write(json.dumps(runs[-1]) + "\n")
    PAGE.write_text(page(judged, runs))
    print(f"written: {PAGE}")
    return worst


def run_of(judged: dict[str, list[Row]]) -> dict[str, Any]:
    """One line of the history: when, where, and each figure's median."""
    reached = {f"{name}.{row.bar.key}": row.reached.median for name, found in judged.items() for row in found}
    return {"at": time.strftime("%Y-%m-%d %H:%M"), "cpus": os.cpu_count(), "reached": reached}


def page(judged: dict[str, list[Row]], runs: list[dict[str, Any]]) -> str:
    """The whole page; nothing of it comes from elsewhere."""
    parts = [f"<!doctype html><meta charset=utf-8><title>Megatoken: benchmarks</title><style>{STYLE}</style>"]
    where = f"{html.escape(platform.machine())}, {os.cpu_count()} cores"
    parts.append(f"<h1>Benchmarks</h1><p>{where}; verdicts are given on 95% intervals.")
    for one in BENCHMARKS:
        parts.append(f"<h2>{html.escape(one.title)}</h2><table><tr><th>figure<th>bar<th>reached<th><th>last runs")
        for row in judged[one.name]:
            key = f"{one.name}.{row.bar.key}"
            past = " · ".join(_short(run["reached"][key]) for run in runs[-SHOWN_RUNS:] if key in run["reached"])
            style = {Verdict.MET: "met", Verdict.MISSED: "missed", Verdict.UNKNOWN: "unknown"}[row.verdict]
            meaning = f"<br><small>{html.escape(row.bar.meaning)}</small>" if row.bar.meaning else ""
            parts.append(
                f"<tr><td>{html.escape(row.bar.key)}{meaning}<td>{row.bar.text}<td>{row.text}"
                f"<td class={style}>{row.verdict}<td><small>{past}</small>"
            )
        parts.append("</table>")
    return "\n".join(parts) + "\n"


def _short(value: float) -> str:
    return f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"


if __name__ == "__main__":
    sys.exit(main())
