"""Makes the engine that a config names; imports only that one. Called by worker/__main__.py."""

from __future__ import annotations

from worker.config import SimulatedConfig, WorkerConfig
from worker.engines.engine import Engine


def make_engine(config: WorkerConfig) -> Engine:
    """The engine of a config, not started."""
    if config.engine == "simulated":
        from worker.engines.simulated_engine import SimulatedEngine

        return SimulatedEngine(config.simulated or SimulatedConfig(), config.max_model_len, config.max_running)
    from worker.engines.vllm_engine import VllmEngine

    return VllmEngine(config)
