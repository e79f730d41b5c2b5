"""The check that a device must pass before it serves again, on this machine's CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

torch = pytest.importorskip("torch")

from megatoken.worker.engines import device_check  # noqa: E402 - it needs torch

CPU = torch.device("cpu")


def clock() -> Iterator[float]:
    seconds = 0.0
    while True:
        yield seconds
        seconds += 1.0


def test_a_device_that_is_well_passes() -> None:
    device_check.check_memory(CPU, 3_000_000)
    device_check.check_products(CPU, 64, 3.0, clock().__next__)


def test_memory_that_forgets_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    filled = torch.Tensor.fill_

    def forgetful(self: torch.Tensor, value: int) -> torch.Tensor:
        filled(self, value)
        self[5] = 0
        return self

    monkeypatch.setattr(device_check, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(torch.Tensor, "fill_", forgetful)
    with pytest.raises(device_check.DeviceProblem, match="3 of 2500 bytes"):
        device_check.check_memory(CPU, 2500)


def test_products_that_differ_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    multiplied, calls = torch.Tensor.__matmul__, iter(range(100))

    def unsure(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return multiplied(left, right) + (next(calls) == 2)

    monkeypatch.setattr(torch.Tensor, "__matmul__", unsure)
    with pytest.raises(device_check.DeviceProblem, match="product 2 of the same two matrices differs"):
        device_check.check_products(CPU, 16, 50.0, clock().__next__)


def test_the_program_says_what_is_wrong_in_one_line() -> None:
    command = [sys.executable, "-m", "megatoken.worker.engines.device_check"]
    assert subprocess.run([*command, "cpu"], capture_output=True, timeout=120, check=False).returncode == 0
    nothing = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    refused = subprocess.run(
        [*command, "mi355x"], env=nothing, capture_output=True, text=True, timeout=120, check=False
    )
    assert refused.returncode == 1
    assert len(refused.stdout.splitlines()) == 1
