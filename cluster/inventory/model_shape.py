"""What a model's config.json says about splitting it and about the memory it takes. Pure, but for `load_shape`.

Checks and estimates run before anything starts: the spec's checks, placement's device_memory_bytes and
`megatoken plan` call them. They are estimates: vLLM measures for itself when it starts, and its word is last.

Formulas, for one rank of TP t on a pipeline stage of L layers, at b bytes a weight:

- attention weights a layer: q and o: 2 * hidden * heads * head_dim / t; k and v: 2 * hidden * kv * head_dim, where
  kv = max(1, kv_heads / t), as vLLM replicates KV heads when TP exceeds them (vLLM's model_executor/models/llama).
- MLA (DeepSeek's latent attention): the low-rank projections of transformers' DeepseekV3Attention.
- MLP a layer: 3 * hidden * intermediate / t (gate, up, down); experts: the same per expert, split over TP (or over the
  expert-parallel ranks: the same share), plus the router and shared experts.
- embedding on the first stage, output head on the last (a tied head on another stage is a copy): vocab * hidden / t.
- layers of a stage: vllm.distributed.utils.get_pp_indices.
- KV cache a token a layer: 2 * kv * head_dim * bytes; MLA: (kv_lora_rank + qk_rope_head_dim) * bytes, on every rank.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GIB = 1 << 30
DTYPE_BYTES = {"float32": 4.0, "float": 4.0, "bfloat16": 2.0, "float16": 2.0, "half": 2.0, "fp8": 1.0, "int8": 1.0}
# Bits a weight by quantization method, scales included: OCP MX: 4-bit values and an 8-bit scale for each 32.
QUANT_BITS = {"fp8": 8.0, "mxfp4": 4.25, "mxfp8": 8.25, "compressed-tensors": 8.0, "bitsandbytes": 4.5}
MAX_CONFIG_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes that decide how a decoder-only transformer may be split, and what it weighs."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    intermediate: int
    max_positions: int = 0
    tied_head: bool = False
    experts: int = 0
    expert_intermediate: int = 0
    shared_experts: int = 0
    active_experts: int = 0
    dense_layers: int = 0
    """With experts: how many of the first layers have a plain MLP instead."""
    latent_kv: int = 0
    """MLA's cached values a token a layer; 0: ordinary KV heads."""
    latent_q: int = 0
    weight_bytes: float = 2.0
    """Bytes a weight as stored, quantisation included."""
    cache_bytes: float = 2.0
    total_bytes: int = 0
    """Weights as the checkpoint's index counts them; 0: unknown, and the formula stands."""


class ShapeError(ValueError):
    """The config does not describe a model that this estimate understands."""


def load_shape(directory: Path, dtype: str = "auto") -> ModelShape:
    """Reads config.json, and the checkpoint's index where there is one. Raises ShapeError or OSError."""
    path = directory / "config.json"
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ShapeError(f"{path}: {path.stat().st_size} bytes is not allowed; at most {MAX_CONFIG_BYTES}")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ShapeError(f"{path}: not JSON: {error}") from None
    total = 0
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            total = int(json.loads(index.read_text())["metadata"]["total_size"])
        except (ValueError, KeyError, TypeError):
            total = 0  # an index without a size is common; the formula stands
    return read_shape(config, dtype=dtype, total_bytes=total)


def read_shape(config: Mapping[str, Any], *, dtype: str = "auto", total_bytes: int = 0) -> ModelShape:
    """The shape that a config.json's content describes. Raises ShapeError naming the field that is missing."""
    if not isinstance(config, Mapping):
        raise ShapeError("config.json: not an object")
    inner = config.get("text_config")
    text = inner if isinstance(inner, Mapping) else config
    stored = str(text.get("dtype") or text.get("torch_dtype") or config.get("torch_dtype") or "bfloat16")
    run_bytes = DTYPE_BYTES.get(stored.removeprefix("torch.") if dtype == "auto" else dtype, 2.0)
    bits = _quantised_bits(config)
    heads = _positive(text, "num_attention_heads", "n_head")
    hidden = _positive(text, "hidden_size", "n_embd")
    experts = _number(text, "num_local_experts", "n_routed_experts", "num_experts")
    intermediate = _number(text, "intermediate_size", "n_inner") or 4 * hidden
    latent = _number(text, "kv_lora_rank")
    return ModelShape(
        layers=_positive(text, "num_hidden_layers", "n_layer"),
        hidden=hidden,
        heads=heads,
        kv_heads=_number(text, "num_key_value_heads") or heads,
        head_dim=_number(text, "head_dim") or _number(text, "v_head_dim") or hidden // heads,
        vocab=_positive(text, "vocab_size"),
        intermediate=intermediate,
        max_positions=_number(text, "max_position_embeddings", "n_positions"),
        tied_head=bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", False))),
        experts=experts,
        expert_intermediate=_number(text, "moe_intermediate_size") or (intermediate if experts else 0),
        shared_experts=_number(text, "n_shared_experts"),
        active_experts=_number(text, "num_experts_per_tok", "experts_per_token"),
        dense_layers=_number(text, "first_k_dense_replace") if experts else 0,
        latent_kv=latent + _number(text, "qk_rope_head_dim") if latent else 0,
        latent_q=_number(text, "q_lora_rank") if latent else 0,
        weight_bytes=bits / 8 if bits else run_bytes,
        cache_bytes=run_bytes,
        total_bytes=total_bytes,
    )


def _quantised_bits(config: Mapping[str, Any]) -> float:
    quantisation = config.get("quantization_config")
    if not isinstance(quantisation, Mapping):
        return 0.0
    bits = quantisation.get("bits")
    if isinstance(bits, int) and bits > 0:
        return bits + 0.5  # group scales and zeros: at most half a bit a weight at groups of 64
    return QUANT_BITS.get(str(quantisation.get("quant_method", "")).lower(), 0.0)


def _number(config: Mapping[str, Any], *names: str) -> int:
    """The first of the fields that holds a number; 0 when none does."""
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return 0


def _positive(config: Mapping[str, Any], *names: str) -> int:
    value = _number(config, *names)
    if value < 1:
        raise ShapeError(f"config.json: {names[0]} is missing or not a positive number")
    return value
