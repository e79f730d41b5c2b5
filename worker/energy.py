"""Energy that a replica's devices used, from their drivers' own counters: NVML on NVIDIA, AMD SMI on AMD.

Both count from when the driver was loaded; a meter counts from its start. There is none where one of the replica's
devices cannot be read: on a CPU, on another node than the worker's, or behind a driver that keeps no counter. A part
would look like a whole.
"""

from __future__ import annotations

import importlib
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final

from megatoken.process.devices import visible_devices
from megatoken.worker.config import WorkerConfig

INTERVAL_S: Final = 1.0  # between readings: a driver's call takes up to a millisecond
MICRO_PER_MILLI: Final = 1000.0

Read = Callable[[], float]
"""One device's counter, in millijoule."""

_log = logging.getLogger(__name__)


class EnergyMeter:
    """Adds up what devices used since it was made. `clock` is monotonic, in seconds."""

    def __init__(self, reads: Sequence[Read], clock: Callable[[], float] = time.monotonic) -> None:
        self._reads, self._clock = reads, clock
        self._last = [read() for read in reads]
        self._read_s = clock()
        self._used = 0.0

    def used_mj(self) -> int:
        """Millijoule; never less than before, also when a counter goes back or a driver fails for a while."""
        if self._clock() - self._read_s >= INTERVAL_S:
            self._read_s = self._clock()
            try:
                now = [read() for read in self._reads]
            except Exception as error:  # whatever the driver's library raises: the next reading has it all
                _log.warning("energy is not read: %s", error)
                return int(self._used)
            self._used += sum(max(0.0, after - before) for after, before in zip(now, self._last, strict=True))
            self._last = now
        return int(self._used)


def meter_of(config: WorkerConfig, environ: Mapping[str, str] = os.environ) -> EnergyMeter | None:
    """For the devices of this replica; None where they cannot all be read."""
    if config.engine != "vllm" or config.device_kind == "cpu" or config.placement_group_id is not None:
        return None
    names = visible_devices(environ, range(config.world_size))
    for library, reads_of in (("pynvml", _nvidia), ("amdsmi", _amd)):
        try:
            return EnergyMeter(reads_of(importlib.import_module(library), names))
        except ImportError:
            continue
        except Exception as error:  # no such device, no counter, no driver
            _log.info("%s does not tell the energy of devices %s: %s", library, ", ".join(names), error)
    return None


def _nvidia(nvml: Any, names: Sequence[str]) -> list[Read]:
    nvml.nvmlInit()
    by_number, by_uuid = nvml.nvmlDeviceGetHandleByIndex, nvml.nvmlDeviceGetHandleByUUID
    handles = [by_number(int(name)) if name.isdecimal() else by_uuid(name) for name in names]
    return [partial(nvml.nvmlDeviceGetTotalEnergyConsumption, handle) for handle in handles]


def _amd(smi: Any, names: Sequence[str]) -> list[Read]:
    smi.amdsmi_init()
    handles = smi.amdsmi_get_processor_handles()

    def read(handle: Any) -> float:
        found = smi.amdsmi_get_energy_count(handle)  # a count, and the microjoule of one
        return float(found["energy_accumulator"]) * float(found["counter_resolution"]) / MICRO_PER_MILLI

    return [partial(read, handles[int(name)]) for name in names]
