"""What NVML and AMD SMI say, in our words. The libraries here are stand-ins."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from megatoken.cluster.ray.device_tasks import driver_states
from megatoken.worker.drivers import Amd, Nvidia, drivers


class IsLost(Exception):
    pass


class NotSupported(Exception):
    pass


def nvml(**changes: Any) -> SimpleNamespace:
    functions = {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetHandleByIndex": lambda number: f"#{number}",
        "nvmlDeviceGetHandleByUUID": str,
        "nvmlDeviceGetTotalEccErrors": lambda handle, kind, since: {"#1": 3}[handle] if (kind, since) == (1, 0) else -1,
        "nvmlDeviceGetRemappedRows": lambda handle: (5, 1, 1, handle == "GPU-bad"),
        "NVML_MEMORY_ERROR_TYPE_UNCORRECTED": 1,
        "NVML_VOLATILE_ECC": 0,
        "NVMLError_GpuIsLost": IsLost,
        "NVMLError_NotSupported": NotSupported,
        **changes,
    }
    return SimpleNamespace(**functions)


def smi(*pages: str) -> SimpleNamespace:
    return SimpleNamespace(
        amdsmi_init=lambda: None,
        amdsmi_get_processor_handles=lambda: ["first", "second"],
        amdsmi_get_gpu_total_ecc_count=lambda handle: {"uncorrectable_count": {"first": 0, "second": 2}[handle]},
        amdsmi_get_gpu_bad_page_info=lambda _handle: [{"status": f"AmdSmiMemoryPageStatus.{page}"} for page in pages],
    )


def raising(error: type[Exception]) -> Any:
    def fail(*_: object) -> None:
        raise error

    return fail


def test_nvidia_counts_uncorrected_errors_and_tells_a_failed_remapping() -> None:
    driver = Nvidia(nvml())
    assert driver.uncorrected_errors("1") == 3
    assert driver.broken("1") == "", "a row that waits for a reset is no reason"
    assert driver.broken("GPU-bad") == "a row of its memory could not be remapped"


def test_a_lost_gpu_is_broken_and_one_that_cannot_tell_is_not() -> None:
    assert Nvidia(nvml(nvmlDeviceGetHandleByIndex=raising(IsLost))).broken("0") == "the GPU has fallen off the bus"
    assert Nvidia(nvml(nvmlDeviceGetRemappedRows=raising(NotSupported))).broken("0") == ""


def test_amd_counts_uncorrectable_errors_and_pages_that_could_not_be_retired() -> None:
    driver = Amd(smi("RESERVED", "UNRESERVABLE", "PENDING", "UNRESERVABLE"))
    assert driver.uncorrected_errors("1") == 2
    assert driver.broken("1") == "2 bad pages of its memory could not be retired"
    assert Amd(smi("RESERVED")).broken("1") == ""
    silent = smi()
    silent.amdsmi_get_gpu_bad_page_info = lambda _handle: "No bad pages found."
    assert Amd(silent).broken("0") == ""


@pytest.fixture
def have(monkeypatch: pytest.MonkeyPatch) -> Any:
    def put(name: str, library: SimpleNamespace | None) -> None:
        module = None
        if library is not None:
            module = ModuleType(name)
            module.__dict__.update(vars(library))
        monkeypatch.setitem(sys.modules, name, module)

    put("pynvml", None)  # importing it fails
    put("amdsmi", None)
    return put


def test_a_library_that_is_missing_or_does_not_open_is_passed_over(have: Any) -> None:
    assert list(drivers()) == []
    have("pynvml", nvml(nvmlInit=raising(RuntimeError)))
    have("amdsmi", smi())
    assert [type(driver) for driver in drivers()] == [Amd]


def test_a_nodes_devices_go_by_what_its_ray_was_given(have: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    have("pynvml", nvml())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,GPU-bad")
    told = driver_states._function([0, 1])
    assert told == {0: (3, ""), 1: (0, "a row of its memory could not be remapped")}, "one without a count has none"
