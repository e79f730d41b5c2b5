"""vLLM's own metrics (`vllm:*`), passed on beside the worker's with the model and the replica as labels.

The engine core sends its scheduler's statistics with each step; vLLM's own Prometheus logger takes them, so names and
meanings are vLLM's. What vLLM measures per token in its front-end is not passed on: this worker has no such front-end,
and measures the same as megatoken_worker_*. Called by engine.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from prometheus_client import REGISTRY, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.samples import Sample
from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import PrometheusStatLogger

# Families that the scheduler's statistics fill; the others would stand at 0 for ever. What worker/metrics.py states
# itself under vLLM's names (requests running and waiting, KV usage, prefix cache, tokens) is not among them.
PASSED_ON: Final = (
    *("vllm:num_requests_waiting_by_reason", "vllm:num_requests_kv_fetch_by_stage", "vllm:external_prefix_cache_"),
    *("vllm:prompt_tokens_cached_by_source", "vllm:spec_decode_", "vllm:lora_requests_info", "vllm:cache_config_info"),
    *("vllm:kv_block_", "vllm:nixl_", "vllm:kv_offload_", "vllm:estimated_"),
)


class VllmMetrics:
    """Takes every step's statistics; `exposition` may be called from another thread."""

    def __init__(self, vllm_config: VllmConfig, model: str, replica: str) -> None:
        engines = list(range(max(1, vllm_config.parallel_config.data_parallel_size)))
        self._logger = PrometheusStatLogger(vllm_config, engines)
        self._logger.log_engine_initialized()
        self._labels = {"model": model, "replica": replica}

    def note(self, scheduler_stats: Any, engine_index: int) -> None:
        """One step's statistics: a dozen gauges and counters, whatever the batch."""
        self._logger.record(scheduler_stats, None, engine_idx=engine_index)

    def exposition(self) -> bytes:
        """The families as Prometheus text."""
        return generate_latest(self)  # type: ignore[arg-type]

    def collect(self) -> Iterator[Metric]:
        """vLLM's families with our labels; generate_latest asks for them."""
        for family in REGISTRY.collect():
            if family.name.startswith(PASSED_ON):
                labelled = Metric(family.name, family.documentation, family.type, family.unit)
                labelled.samples = [
                    Sample(one.name, {**one.labels, **self._labels}, one.value, one.timestamp, one.exemplar)
                    for one in family.samples
                    if not one.name.endswith("_created")
                ]
                yield labelled
