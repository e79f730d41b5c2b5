"""Counters of drivers are added up for all of a replica's devices or for none. The drivers here are stand-ins."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from megatoken.worker.config import WorkerConfig
from megatoken.worker.energy import EnergyMeter, meter_of

COUNTS = {"0": 1000.0, "1": 500.0, "GPU-abc": 70.0}


def config(**fields: Any) -> WorkerConfig:
    values = {"replica": "r", "model": "m", "source": "x", "counters_dir": "/c", "device_kind": "h200", **fields}
    return WorkerConfig.model_validate(values)


class Device:
    def __init__(self, *values: float) -> None:
        self.values = list(values)

    def __call__(self) -> float:
        value = self.values.pop(0)
        if value < 0:
            raise RuntimeError("the driver is busy")
        return value


def used(devices: Sequence[Device], readings: int, step_s: float = 1.0) -> list[int]:
    now = [0.0]
    meter = EnergyMeter(devices, lambda: now[0])
    found = []
    for _ in range(readings):
        now[0] += step_s
        found.append(meter.used_mj())
    return found


def test_it_counts_from_its_start_over_all_devices() -> None:
    assert used([Device(1000, 1100, 1300), Device(7, 8, 9)], 2) == [101, 302]


def test_a_counter_that_went_back_and_a_driver_that_failed_lose_nothing() -> None:
    assert used([Device(1000, 1100, 5, 25)], 3) == [100, 100, 120]
    assert used([Device(1000, 1100, -1, 1300)], 3) == [100, 100, 300]


def test_a_driver_is_asked_once_a_second() -> None:
    assert used([Device(0, 10, 20)], 4, step_s=0.5) == [0, 10, 10, 20]


def nvml(**changes: Any) -> SimpleNamespace:
    def energy(handle: str) -> int:
        return int(COUNTS[handle])

    functions = {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetHandleByIndex": str,
        "nvmlDeviceGetHandleByUUID": str,
        "nvmlDeviceGetTotalEnergyConsumption": energy,
        **changes,
    }
    return SimpleNamespace(**functions)


def smi() -> SimpleNamespace:
    return SimpleNamespace(
        amdsmi_init=lambda: None,
        amdsmi_get_processor_handles=lambda: ["first", "second"],
        amdsmi_get_energy_count=lambda _handle: {"energy_accumulator": 4000, "counter_resolution": 15.3},
    )


@pytest.fixture(autouse=True)
def _no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pynvml", "amdsmi"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails


def have(monkeypatch: pytest.MonkeyPatch, name: str, library: SimpleNamespace) -> None:
    module = ModuleType(name)
    module.__dict__.update(vars(library))
    monkeypatch.setitem(sys.modules, name, module)


def test_without_a_library_there_is_no_meter() -> None:
    assert meter_of(config(), {}) is None


@pytest.mark.parametrize(
    "fields",
    [
        {"engine": "simulated", "simulated": {}},
        {"placement_group_id": "ab", "ray_address": "h:1", "rank_devices": (0, 1), "pipeline_parallel": 2},
    ],
)
def test_what_is_not_all_read_has_none(monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]) -> None:
    have(monkeypatch, "pynvml", nvml())
    assert meter_of(config(**fields), {}) is None
    assert meter_of(config(), {}) is not None


def test_nvidia_by_number_and_by_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    have(monkeypatch, "pynvml", nvml())
    meter = meter_of(config(tensor_parallel=2), {"CUDA_VISIBLE_DEVICES": "1,GPU-abc"})
    assert meter is not None
    assert meter._last == [500.0, 70.0]


def test_a_driver_without_the_counter_leaves_it_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(_handle: str) -> int:
        raise RuntimeError("Not Supported")

    have(monkeypatch, "pynvml", nvml(nvmlDeviceGetTotalEnergyConsumption=unsupported))
    assert meter_of(config(), {}) is None
    have(monkeypatch, "amdsmi", smi())
    meter = meter_of(config(), {"HIP_VISIBLE_DEVICES": "1"})
    assert meter is not None
    assert meter._last == [pytest.approx(61.2)], "4,000 counts of 15.3 microjoule, in millijoule"


def package(powercap: Path, number: int, used_uj: int, most_uj: int = 1 << 40) -> Path:
    path = powercap / f"intel-rapl:{number}"
    path.mkdir(parents=True)
    (path / "energy_uj").write_text(f"{used_uj}\n")
    (path / "max_energy_range_uj").write_text(f"{most_uj}\n")
    return path / "energy_uj"


def test_a_cpu_replica_has_its_ranks_share_of_the_packages_and_no_part_twice(tmp_path: Path) -> None:
    first, _ = package(tmp_path, 0, 5_000_000), package(tmp_path, 1, 1_000_000)
    (tmp_path / "intel-rapl:0:0").mkdir()  # the cores of a package, which its counter has already
    meter = meter_of(config(device_kind="cpu", tensor_parallel=2, cpu_ranks=4), {}, tmp_path)
    assert meter is not None
    first.write_text("9000000\n")
    meter._clock = lambda: meter._read_s + 1.0  # type: ignore[method-assign]
    assert meter.used_mj() == 2000, "half of 4 J"
    first.write_text("9001000\n")
    assert meter.used_mj() == 2000, "half a millijoule more"


def test_a_counter_of_a_package_begins_anew_at_its_range(tmp_path: Path) -> None:
    counter = package(tmp_path, 0, 9_000_000, most_uj=10_000_000)
    meter = meter_of(config(device_kind="cpu"), {}, tmp_path)
    assert meter is not None
    meter._clock = lambda: meter._read_s + 1.0  # type: ignore[method-assign]
    counter.write_text("1000000\n")
    assert meter.used_mj() == 2000


def test_a_machine_whose_counters_are_not_there_or_not_for_us_has_no_meter(tmp_path: Path) -> None:
    assert meter_of(config(device_kind="cpu"), {}, tmp_path) is None
    package(tmp_path, 0, 1).unlink()
    assert meter_of(config(device_kind="cpu"), {}, tmp_path) is None
