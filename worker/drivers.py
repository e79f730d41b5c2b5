"""What accelerator drivers tell of their devices: NVML on NVIDIA, AMD SMI on AMD.

Devices go by the driver's number, NVIDIA's also by uuid. A driver that cannot tell something raises what its library
raises; callers leave that out.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any, Final, Protocol

MICRO_PER_MILLI: Final = 1000.0
UNRESERVABLE: Final = "UNRESERVABLE"  # AMD's name for a bad page that could not be retired


class Driver(Protocol):
    """One vendor's library, opened."""

    def energy_mj(self, name: str) -> float:
        """What the device used since the driver was loaded, in millijoule."""

    def uncorrected_errors(self, name: str) -> int:
        """Memory errors since the driver was loaded that its ECC could not mend."""

    def broken(self, name: str) -> str:
        """Why the driver itself says that the device should not be used; empty: it does not say so."""


class Nvidia:
    """NVML, from nvidia-ml-py."""

    def __init__(self, nvml: Any) -> None:
        nvml.nvmlInit()
        self._nvml = nvml

    def _handle(self, name: str) -> Any:
        nvml = self._nvml
        return nvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdecimal() else nvml.nvmlDeviceGetHandleByUUID(name)

    def energy_mj(self, name: str) -> float:
        return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle(name)))

    def uncorrected_errors(self, name: str) -> int:
        nvml = self._nvml
        return int(
            nvml.nvmlDeviceGetTotalEccErrors(
                self._handle(name), nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
            )
        )

    def broken(self, name: str) -> str:
        nvml = self._nvml
        try:
            _corrected, _uncorrected, _pending, failed = nvml.nvmlDeviceGetRemappedRows(self._handle(name))
        except nvml.NVMLError_GpuIsLost:
            return "the GPU has fallen off the bus"
        except nvml.NVMLError_NotSupported:  # older than Ampere
            return ""
        return "a row of its memory could not be remapped" if failed else ""


class Amd:
    """AMD SMI, from amdsmi."""

    def __init__(self, smi: Any) -> None:
        smi.amdsmi_init()
        self._smi = smi
        self._handles = smi.amdsmi_get_processor_handles()

    def energy_mj(self, name: str) -> float:
        found = self._smi.amdsmi_get_energy_count(self._handles[int(name)])  # a count, and the microjoule of one
        return float(found["energy_accumulator"]) * float(found["counter_resolution"]) / MICRO_PER_MILLI

    def uncorrected_errors(self, name: str) -> int:
        return int(self._smi.amdsmi_get_gpu_total_ecc_count(self._handles[int(name)])["uncorrectable_count"])

    def broken(self, name: str) -> str:
        pages = self._smi.amdsmi_get_gpu_bad_page_info(self._handles[int(name)])
        bad = sum(1 for page in pages if isinstance(page, dict) and UNRESERVABLE in str(page.get("status")))
        return f"{bad} bad pages of its memory could not be retired" if bad else ""


def drivers() -> Iterator[Driver]:
    """Those whose library is installed and opens."""
    for library, driver in (("pynvml", Nvidia), ("amdsmi", Amd)):
        try:
            yield driver(importlib.import_module(library))
        except Exception:  # not installed, no driver, no device of theirs: whatever the library raises
            continue
