"""Each target over its seeds and a few thousand inputs that libFuzzer makes of them; `make fuzz` runs a million."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.fuzz.__main__ import TooSlow, timed
from tests.fuzz.targets import TARGETS

pytest.importorskip(
    "atheris", reason="atheris is not installed; it has wheels for Linux on x86-64 (deploy/requirements/dev.txt)"
)

SEEDS = Path(__file__).parent / "seeds"
REPOSITORY = SEEDS.parents[2]
RUNS, SECONDS = 3000, 6


def test_every_target_has_seeds() -> None:
    assert {entry.name for entry in SEEDS.iterdir()} == set(TARGETS)


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_is_found(name: str) -> None:
    command = [sys.executable, "-m", "tests.fuzz", name, "--runs", str(RUNS), "--seconds", str(SECONDS)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False, cwd=REPOSITORY)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-6000:]
    executed = re.search(r"stat::number_of_executed_units: (\d+)", ended.stderr)
    assert executed is not None, ended.stderr[-2000:]
    assert int(executed[1]) > len(list((SEEDS / name).iterdir())), "not even every seed was run"


def test_an_input_is_slow_by_what_it_computes_and_not_by_how_long_it_waits() -> None:
    def computes(_data: bytes) -> None:
        until = time.process_time() + 0.2
        while time.process_time() < until:
            pass

    timed(lambda _data: time.sleep(0.3), limit_s=0.1)(b"")
    with pytest.raises(TooSlow, match="3 bytes took"):
        timed(computes, limit_s=0.1)(b"abc")
