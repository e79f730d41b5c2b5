"""Coverage-guided fuzzing of everything that reads bytes from outside, with atheris.

    python -m tests.fuzz                                a million inputs over all targets, bounded by time
    python -m tests.fuzz NAME [--runs N] [--seconds S]  one target
    python -m tests.fuzz NAME FILE                      one input again, without atheris

A finding is an exception of a target, or an input that takes more than INPUT_S of processor time. libFuzzer leaves the
input beside the corpus in bench-results/fuzz; keep it as a seed once it is mended. Ends with 1 when anything was found.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

INPUTS = 1_000_000  # over all targets
TARGET_S = 300  # for one target, at most: the slowest takes 250 s on two cores for its share of the inputs
INPUT_S = 5.0  # one input, in processor time: a machine that does other things as well makes none slow
HANG_S = 180  # one input, in real time: libFuzzer's own limit, for one that never comes to an end
MAX_BYTES = 4096
SEEDS = Path(__file__).parent / "seeds"
FOUND = Path("bench-results/fuzz")
INSTRUMENTED = ["megatoken", "router", "cluster", "worker", "yaml"]


class TooSlow(Exception):
    """One input took more than its processor time."""


def timed(target: Callable[[bytes], None], limit_s: float = INPUT_S) -> Callable[[bytes], None]:
    """`target`, for which an input that takes more processor time is a finding."""

    def run(data: bytes) -> None:
        began = time.process_time()
        target(data)
        used_s = time.process_time() - began
        if used_s > limit_s:
            raise TooSlow(f"{len(data)} bytes took {used_s:.1f} s of processor time; at most {limit_s:.1f} s")

    return run


def fuzz(name: str, runs: int, seconds: int) -> None:
    """Fuzzes one target; does not return: libFuzzer ends the process, with a status other than 0 for a finding."""
    import atheris

    # Only what reads the bytes: with all that it pulls in (pydantic, Ray) the start would take a minute.
    with atheris.instrument_imports(include=INSTRUMENTED, enable_loader_override=False):
        from tests.fuzz.targets import TARGETS
    logging.disable(logging.CRITICAL)  # what a program would log of each bad input
    corpus = FOUND / name
    corpus.mkdir(parents=True, exist_ok=True)
    target = timed(TARGETS[name])
    options = [f"-runs={runs}", f"-max_total_time={seconds}", f"-timeout={HANG_S}", f"-max_len={MAX_BYTES}"]
    options += [f"-artifact_prefix={corpus}.", "-print_final_stats=1", "-rss_limit_mb=2048"]
    atheris.Setup([name, *options, str(corpus), str(SEEDS / name)], target)
    atheris.Fuzz()


def run_all(runs: int, seconds: int) -> int:
    """Each target in a process of its own; returns the exit status."""
    names = sorted(entry.name for entry in SEEDS.iterdir())
    bad, total = [], 0
    for number, name in enumerate(names, start=1):
        command = [sys.executable, "-m", "tests.fuzz", name, "--runs", str(runs // len(names))]
        ended = subprocess.run([*command, "--seconds", str(seconds)], capture_output=True, text=True, check=False)
        done = re.findall(r"stat::number_of_executed_units: (\d+)", ended.stderr)
        count = int(done[0]) if done else 0
        total += count
        print(f"[{number}/{len(names)}] {name}: {count} inputs, status {ended.returncode}", flush=True)
        if ended.returncode:
            bad.append(name)
            print(ended.stderr[-4000:], flush=True)
    print(f"{total} inputs; " + (f"FOUND: {', '.join(bad)}" if bad else "nothing found"), flush=True)
    return 1 if bad else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("name", nargs="?", choices=sorted(entry.name for entry in SEEDS.iterdir()))
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--runs", type=int, default=INPUTS)
    parser.add_argument("--seconds", type=int, default=TARGET_S)
    arguments = parser.parse_args()
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    if arguments.name is None:
        return run_all(arguments.runs, arguments.seconds)
    if arguments.file is not None:
        from tests.fuzz.targets import TARGETS

        timed(TARGETS[arguments.name])(arguments.file.read_bytes())
        print("nothing found")
        return 0
    fuzz(arguments.name, arguments.runs, arguments.seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
