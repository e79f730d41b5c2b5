"""A worker's monotonic totals: one place that the counters file, Prometheus and Load all read.

The numbers live in the memory-mapped counters file (megatoken.counters), so a killed worker's totals stay readable.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from megatoken.counters import INDEX, CounterWriter
from megatoken.worker.config import WorkerConfig

PROMPT_TOKENS: Final = INDEX["prompt_tokens"]
GENERATED_TOKENS: Final = INDEX["generated_tokens"]
CACHED_TOKENS: Final = INDEX["cached_tokens"]
REQUESTS_STARTED: Final = INDEX["requests_started"]
REQUESTS_FINISHED: Final = INDEX["requests_finished"]
REQUESTS_FAILED: Final = INDEX["requests_failed"]
BUSY_US: Final = INDEX["busy_us"]
ENERGY_MJ: Final = INDEX["energy_mj"]
MADE_TOKENS: Final = INDEX["made_tokens"]
DROPPED_TOKENS: Final = INDEX["dropped_tokens"]


def open_counters(config: WorkerConfig) -> CounterWriter:
    """Makes the counters file <counters_dir>/<replica>.<incarnation>.counters of this worker."""
    path = Path(config.counters_dir) / f"{config.replica}.{config.incarnation}.counters"
    header = {
        "kind": "worker",
        "id": config.replica,
        "incarnation": config.incarnation,
        "model": config.model,
        "engine": config.engine,
        "device_kind": config.device_kind,
        "devices": config.world_size * config.data_parallel,
        "node": config.node,
        "site": config.site,
    }
    return CounterWriter(path, header)


class BusyClock:
    """Adds up the time with at least one request running, in microseconds. `now_s` is monotonic."""

    def __init__(self) -> None:
        self._since_s: float | None = None

    def update(self, running: bool, now_s: float) -> int:
        """Microseconds to add to the total since the last call."""
        since_s, self._since_s = self._since_s, now_s if running else None
        return 0 if since_s is None else int((now_s - since_s) * 1e6)
