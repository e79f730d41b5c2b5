"""Energy that a replica's devices used, from counters of their drivers, or of the processor packages (RAPL) for CPUs.

A meter counts from its start. There is none where one of the replica's devices cannot be read: on another node than
the worker's, behind a driver that keeps no counter, or where only root may read RAPL's. A part would look like a whole.
A CPU replica is given the packages' energy by its ranks' share of those on its node when it started.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from megatoken.process.devices import visible_devices
from megatoken.worker.config import WorkerConfig
from megatoken.worker.drivers import MICRO_PER_MILLI, drivers

INTERVAL_S: Final = 1.0  # between readings: a driver's call takes up to a millisecond
POWERCAP: Final = Path("/sys/class/powercap")

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


def meter_of(
    config: WorkerConfig, environ: Mapping[str, str] = os.environ, powercap: Path = POWERCAP
) -> EnergyMeter | None:
    """For the devices of this replica; None where they cannot all be read."""
    if config.engine != "vllm" or config.placement_group_id is not None:
        return None
    if config.device_kind == "cpu":
        return _cpu_meter(config, powercap)
    names = visible_devices(environ, range(config.world_size))
    for driver in drivers():
        try:
            return EnergyMeter([partial(driver.energy_mj, name) for name in names])
        except Exception as error:  # no such device, no counter
            _log.info("the energy of devices %s is not told: %s", ", ".join(names), error)
    return None


def _cpu_meter(config: WorkerConfig, powercap: Path) -> EnergyMeter | None:
    share = config.world_size / max(config.world_size, config.cpu_ranks or 1)
    try:
        packages = [path for path in powercap.glob("intel-rapl:*") if path.name.count(":") == 1]
        return EnergyMeter([Package(path, share) for path in packages]) if packages else None
    except (OSError, ValueError) as error:
        _log.info("the energy of this machine's processors is not told: %s", error)
        return None


class Package:
    """One processor package's share, from RAPL's counter, which begins anew at its range."""

    def __init__(self, path: Path, share: float) -> None:
        self._counter, self._share = path / "energy_uj", share
        self._range = int((path / "max_energy_range_uj").read_text())
        self._turns, self._last = 0, 0

    def __call__(self) -> float:
        """Millijoule."""
        now = int(self._counter.read_text())
        self._turns += now < self._last
        self._last = now
        return (self._turns * self._range + now) * self._share / MICRO_PER_MILLI
