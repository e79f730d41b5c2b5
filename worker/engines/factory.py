"""Makes the engine that a config names; imports only that one. Called by worker/__main__.py."""

from __future__ import annotations

from megatoken.worker.config import SimulatedConfig, WorkerConfig
from megatoken.worker.engines.engine import Engine


def make_engine(config: WorkerConfig) -> Engine:
    """The engine of a config, not started."""
    if config.engine == "simulated":
        from megatoken.worker.engines.simulated.engine import SimulatedEngine

        return SimulatedEngine(config.simulated or SimulatedConfig(), config.max_model_len, config.max_running)
    from megatoken.worker.engines.vllm.engine import VllmEngine

    return VllmEngine(config)
