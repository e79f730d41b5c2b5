"""What the throughput collective costs, and how it takes faults: `make bench-throughput`.

    python -m tests.bench.throughput [--kills 100] [--epochs 1000] [--pairs 60] [--ranks 64] [--only PART ...]

Parts: recovery (kill -9 of agents), leaks (epoch changes), counts (three counts after chaos), overhead (serving with
and without sampling), scale (real gloo ranks, and a model of them). Prints a table and writes
bench-results/throughput.json. All is on one machine with real processes; where it has few cores, ranks share them, so
CPU time a tick is the figure that travels and wall time is an upper bound.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from tests.bench.bars import Bar, lines, rows, status
from tests.bench.throughput_cost import overhead, scale
from tests.bench.throughput_faults import counts, leaks, recovery

RESULTS = Path("bench-results/throughput.json")
BARS = (
    Bar("recovery_s_p99", 3.0, False, "seconds from kill -9 to the next complete sample, p99"),
    Bar("leaked_fds", 0, False, "descriptors, threads and processes left over the epoch changes"),
    Bar("overhead_ratio", 0.005, False, "serving throughput lost to sampling, paired median"),
    Bar("overhead_cpu_share", 0.005, False, "share of the machine's CPU time that sampling takes"),
)


def main() -> int:
    """Runs the parts asked for and merges them into the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=1000)
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--ranks", type=int, default=64)
    found: dict[str, Any] = {}
    parts: dict[str, Callable[[Path, argparse.Namespace], Awaitable[dict[str, Any]]]] = {
        "recovery": lambda directory, asked: recovery(directory, asked.kills, found if asked.add else {}),
        "leaks": lambda directory, asked: leaks(directory, asked.epochs),
        "counts": lambda directory, asked: counts(directory),
        "overhead": lambda directory, asked: overhead(directory, asked.pairs),
        "scale": lambda directory, asked: scale(asked.ranks),
    }
    parser.add_argument("--add", action="store_true", help="add the kills to those of the results that are there")
    parser.add_argument("--only", nargs="*", choices=sorted(parts), default=list(parts))
    asked = parser.parse_args()
    if set(asked.only) != set(parts) and RESULTS.exists():
        found |= json.loads(RESULTS.read_text())
    for name in asked.only:
        started = time.monotonic()
        print(f"{name}: running", flush=True)
        with tempfile.TemporaryDirectory(prefix="mt-bench-") as directory:
            found |= asyncio.run(run(parts[name], Path(directory), asked))
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps({**found, "cores": os.cpu_count()}, indent=1) + "\n")
    show(found)
    return status(rows(BARS, found))


async def run(
    part: Callable[..., Awaitable[dict[str, Any]]], directory: Path, asked: argparse.Namespace
) -> dict[str, Any]:
    """One part, with a loop of its own."""
    return await part(directory, asked)


def show(found: dict[str, Any]) -> None:
    """The figures beside their bars, then the ranks."""
    print("\n".join(lines(rows(BARS, found))))
    if "counts_equal" in found:
        print(f"{'counts_equal':20} {found['counts_equal']!s:>12}  three counts after chaos, to the token")
    for line in found.get("ranks", []):
        print(
            f"  {line['ranks']:4} ranks, {line['levels']:9} {line['bytes']:6} B"
            f"  CPU a rank and tick {line['cpu_us']:7.0f} us"
            f"  wall {line['wall_ms_p50']:7.1f} ms  forming {line['form_s']:.2f} s"
        )
    if "model" in found:
        print(f"  model: {found['model']['text']}")


if __name__ == "__main__":
    sys.exit(main())
