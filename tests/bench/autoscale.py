"""`make bench-report`: how autoscaling does on traces, beside an oracle. Simulated.

Prints a table and writes the part "autoscaler" of bench-results/proof.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from megatoken.cluster.spec.autoscale import AutoscaleSpec
from tests.bench.bars import Bar, lines, rows, status
from tests.support import autoscaled_traces as traces

RESULTS = Path("bench-results/proof.json")
SPEC = AutoscaleSpec(max_replicas=100, utilisation=0.85, ttft_p99_s=3.0, scale_down_after_s=180)
START_S, PEAK, SEEDS = 30.0, 20.0, (1, 2)
SHAPES = (traces.diurnal, traces.step, traces.flash_crowd, traces.bursty)
BARS = (
    Bar("autoscaler.objective_met", 0.99, True, "of requests, on the worst trace"),
    Bar("autoscaler.replica_hours_over_oracle", 0.15, False, "on the worst trace"),
)


def measure() -> dict[str, Any]:
    """The worst of two seeds and both kinds of lengths, by trace."""
    by_trace: dict[str, dict[str, float]] = {}
    for shape in SHAPES:
        met, over = [], []
        for lengths in traces.LENGTHS:
            for seed in SEEDS:
                trace = traces.make_trace(shape, lengths, PEAK, traces.SECONDS, seed)
                best = traces.oracle(trace, 3.0, START_S)
                found = traces.autoscaled(trace, SPEC, START_S, first=max(1, round(PEAK * shape(0.0) / 0.85)))
                met.append(found.met)
                over.append(found.replica_s / best.replica_s - 1)
        by_trace[shape.__name__] = {"objective_met": min(met), "replica_hours_over_oracle": max(over)}
        print(f"{shape.__name__:12} met {min(met):7.2%}, {max(over):+.1%} replica-hours", flush=True)
    return {
        "simulated": True,
        "objective_met": min(one["objective_met"] for one in by_trace.values()),
        "replica_hours_over_oracle": max(one["replica_hours_over_oracle"] for one in by_trace.values()),
        "by_trace": by_trace,
    }


def main() -> int:
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results["autoscaler"] = measure()
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    judged = rows(BARS, results)
    print("\n".join(lines(judged)))
    return status(judged)


if __name__ == "__main__":
    sys.exit(main())
