"""In which order splits of a model are expected to serve: a roofline of decoding. Pure; plan.py sorts by it.

It orders; it does not predict. One decode step of a stage, for a micro-batch of b requests of c cached tokens, takes

    t(b) = (weights_read + b * c * kv_per_token) / bandwidth            reading weights and cache
         + 2 * layers * (latency + 2 (t-1)/t * b * hidden * 2 / link)   two all-reduces a layer inside a TP group

and a replica of p stages keeps p micro-batches in flight, so it makes b / t(b) tokens a second. The batch p * b is what
the KV cache holds, at most vLLM's limit of running requests. Left out: prefill, compute limits at very large batches,
pipeline bubbles when fewer requests wait than the batch holds, expert imbalance. Figures are the vendors' peak rates.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatoken.cluster.inventory.model_memory import active_bytes, memory_need, stage_layers
from megatoken.cluster.inventory.model_shape import ModelShape

CONTEXT_TOKENS = 1024  # cached tokens of a running request, on average
MOST_RUNNING = 1024  # vLLM's default limit of running requests on large devices


@dataclass(frozen=True, slots=True)
class DeviceRates:
    """Peak memory bandwidth, link bandwidth to a neighbour group, and the latency of a small all-reduce."""

    bandwidth_bytes_per_s: float
    link_bytes_per_s: float
    latency_s: float = 15e-6


RATES = {
    "mi300x": DeviceRates(5.3e12, 448e9),  # AMD Instinct data sheets
    "mi325x": DeviceRates(6.0e12, 448e9),
    "mi350x": DeviceRates(8.0e12, 537e9),
    "mi355x": DeviceRates(8.0e12, 537e9),
    "a100": DeviceRates(2.0e12, 300e9),  # NVIDIA data sheets; NVLink, one way
    "h100": DeviceRates(3.35e12, 450e9),
    "h200": DeviceRates(4.8e12, 450e9),
    "b200": DeviceRates(8.0e12, 900e9),
    "cpu": DeviceRates(0.05e12, 5e9, 100e-6),  # a slot of a two-socket server; Gloo or shared memory between slots
}
UNKNOWN = DeviceRates(3.0e12, 100e9)


def rate_of(shape: ModelShape, kind: str, *, tensor: int, pipeline: int, kv_tokens: int = 0) -> float:
    """Expected tokens a second of one replica in steady decode. `kv_tokens` 0: the batch limit alone holds."""
    rates = RATES.get(kind, UNKNOWN)
    need = memory_need(shape, tensor=tensor, pipeline=pipeline)
    batch = min(MOST_RUNNING, kv_tokens // CONTEXT_TOKENS if kv_tokens else MOST_RUNNING)
    micro = max(batch / pipeline, 1.0)
    layers = max(stage_layers(shape.layers, pipeline))
    read = active_bytes(shape) / tensor * layers / shape.layers
    if shape.experts and shape.active_experts:  # a batch touches more experts than one token does
        share = 1 - (1 - shape.active_experts / shape.experts) ** micro
        read += share * (need.weights - read) if need.weights > read else 0.0
    memory_s = (read + micro * CONTEXT_TOKENS * need.kv_per_token) / rates.bandwidth_bytes_per_s
    payload = 2 * (tensor - 1) / tensor * micro * shape.hidden * 2
    reduce_s = 2 * layers * (rates.latency_s + payload / rates.link_bytes_per_s) if tensor > 1 else 0.0
    send_s = (rates.latency_s + micro * shape.hidden * 2 / rates.link_bytes_per_s) if pipeline > 1 else 0.0
    return micro / (memory_s + reduce_s + send_s)
