"""Estimates against published sizes, and the checks of parallel sizes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatoken.cluster.inventory.model_memory import (
    MemoryNeed,
    active_bytes,
    memory_need,
    parallel_problems,
    stage_layers,
    tensor_sizes,
    weight_total,
)
from megatoken.cluster.inventory.model_shape import GIB, ModelShape, ShapeError, load_shape, read_shape

SMOLLM2 = {
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
LLAMA2_70B = {
    "num_hidden_layers": 80,
    "hidden_size": 8192,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "intermediate_size": 28672,
    "max_position_embeddings": 4096,
    "torch_dtype": "float16",
}
DEEPSEEK_V3 = {
    "num_hidden_layers": 61,
    "hidden_size": 7168,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "vocab_size": 129280,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "torch_dtype": "bfloat16",
}
GPT_OSS_120B = {
    "num_hidden_layers": 36,
    "hidden_size": 2880,
    "head_dim": 64,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 201088,
    "intermediate_size": 2880,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "quantization_config": {"quant_method": "mxfp4"},
}


@pytest.mark.parametrize(
    ("config", "published_bytes", "within"),
    [
        (SMOLLM2, 269.06e6, 0.01),  # size of the model's own safetensors file
        (LLAMA2_70B, 137.95e9, 0.01),  # 68.98 B parameters
        (DEEPSEEK_V3, 2 * 671e9, 0.01),
        (GPT_OSS_120B, 63.0e9, 0.05),  # the published checkpoint keeps attention in bfloat16
    ],
)
def test_weights_come_to_the_published_size(config: dict[str, object], published_bytes: float, within: float) -> None:
    assert weight_total(read_shape(config)) == pytest.approx(published_bytes, rel=within)


def test_a_decode_step_of_a_mixture_reads_the_active_experts_only() -> None:
    assert active_bytes(read_shape(DEEPSEEK_V3)) / 2 == pytest.approx(37e9, rel=0.03)
    dense = read_shape(LLAMA2_70B)
    assert active_bytes(dense) == weight_total(dense)


@pytest.mark.parametrize(
    ("config", "sizes"),
    [(SMOLLM2, (1, 3, 9)), (LLAMA2_70B, (1, 2, 4, 8, 16, 32, 64))],
)
def test_tensor_sizes_go_evenly_with_heads_and_kv_heads(config: dict[str, object], sizes: tuple[int, ...]) -> None:
    assert tensor_sizes(read_shape(config)) == sizes


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"tensor": 2}, "parallel.tensor: 2 is not allowed; it must divide 9 attention heads"),
        ({"pipeline": 31}, "parallel.pipeline: 31 is not allowed; at most the 30 layers"),
        ({"expert": 2}, "parallel.expert: 2 is not allowed; the model has no experts"),
        ({"data": 0}, "parallel.data: 0 is not allowed"),
    ],
)
def test_impossible_sizes_name_the_field_the_value_and_what_is_allowed(sizes: dict[str, int], said: str) -> None:
    (problem,) = parallel_problems(read_shape(SMOLLM2), **sizes)
    assert problem.startswith(said)


def test_possible_sizes_have_no_problem() -> None:
    assert parallel_problems(read_shape(SMOLLM2), tensor=3, pipeline=30, data=4) == ()
    assert parallel_problems(read_shape(DEEPSEEK_V3), tensor=16, data=2, expert=32) == ()


@pytest.mark.parametrize(("layers", "stages", "split"), [(30, 4, (7, 8, 8, 7)), (4, 2, (2, 2)), (7, 3, (2, 3, 2))])
def test_stage_layers_are_vllms(layers: int, stages: int, split: tuple[int, ...]) -> None:
    assert stage_layers(layers, stages) == split


def test_splitting_divides_the_weights_and_the_cache() -> None:
    shape = read_shape(LLAMA2_70B)
    one, eight = memory_need(shape), memory_need(shape, tensor=8)
    assert eight.weights == pytest.approx(one.weights / 8, rel=0.01)
    assert eight.kv_per_token == one.kv_per_token // 8
    assert memory_need(shape, tensor=16).kv_per_token == eight.kv_per_token, "KV heads are replicated past 8"
    assert memory_need(shape, tensor=8, pipeline=2).weights < eight.weights


def test_seventy_billion_parameters_fit_one_mi355x_and_not_one_mi250() -> None:
    need = memory_need(read_shape(LLAMA2_70B))
    assert need.device < 288 * GIB
    assert need.device > 128 * GIB
    assert need.kv_tokens(288 * GIB) > 200_000
    assert need.kv_tokens(128 * GIB) < 0


def test_a_checkpoint_index_overrides_the_formula(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM2))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 300_000_000}}))
    assert weight_total(load_shape(tmp_path)) == 300_000_000


def test_a_nested_text_config_is_read() -> None:
    assert read_shape({"text_config": LLAMA2_70B, "vision_config": {}}).layers == 80


@pytest.mark.parametrize("missing", ["num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size"])
def test_a_config_without_its_sizes_is_refused_by_name(missing: str) -> None:
    with pytest.raises(ShapeError, match=f"{missing} is missing"):
        read_shape({key: value for key, value in SMOLLM2.items() if key != missing})


def test_a_config_that_is_not_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ShapeError, match="not JSON"):
        load_shape(tmp_path)


def test_dtype_of_the_spec_overrides_the_stored_one() -> None:
    assert isinstance(read_shape(SMOLLM2, dtype="float32"), ModelShape)
    assert weight_total(read_shape(SMOLLM2, dtype="float32")) == 2 * weight_total(read_shape(SMOLLM2))


# A layer at TP 1 has 192 attention and 576 MLP weights of 2 bytes; embedding and head have 256 each.
SMALL = ModelShape(layers=4, hidden=8, heads=4, kv_heads=2, head_dim=2, vocab=32, intermediate=24)
# The first layer is SMALL's; the others have 4 experts and 1 shared one of 96 weights, and 32 weights of router.
MIXED = replace(SMALL, experts=4, active_experts=2, shared_experts=1, expert_intermediate=4, dense_layers=1)
LATENT = replace(SMALL, latent_kv=6, latent_q=3)


@pytest.mark.parametrize(
    ("shape", "split", "weights", "kv_per_token"),
    [
        (SMALL, {}, 7168, 64),
        (SMALL, {"tensor": 2}, 3584, 32),
        (SMALL, {"tensor": 4}, 1920, 32),
        (SMALL, {"pipeline": 2}, 3584, 32),
        (SMALL, {"pipeline": 3}, 3072, 32),
        (SMALL, {"pipeline": 4}, 2048, 16),
        (SMALL, {"tensor": 2, "pipeline": 2}, 1792, 16),
        (replace(SMALL, tied_head=True), {}, 6656, 64),
        (replace(SMALL, tied_head=True), {"pipeline": 2}, 3584, 32),
        (replace(SMALL, weight_bytes=1.0), {}, 4096, 64),
        (replace(SMALL, cache_bytes=4.0), {}, 8192, 128),
        (replace(SMALL, total_bytes=14336), {}, 14336, 64),
        (replace(SMALL, total_bytes=14336), {"tensor": 2}, 7168, 32),
        (replace(SMALL, total_bytes=14336), {"pipeline": 2}, 7168, 32),
        (MIXED, {}, 6784, 64),
        (MIXED, {"tensor": 2}, 3488, 32),
        (MIXED, {"pipeline": 2}, 3456, 32),
        (MIXED, {"pipeline": 4}, 2048, 16),
        (replace(MIXED, expert_intermediate=8), {"pipeline": 4}, 2880, 16),
        (replace(MIXED, weight_bytes=1.0), {}, 4000, 64),
        (replace(MIXED, dense_layers=0), {}, 6656, 64),
        (LATENT, {}, 7776, 48),
        (LATENT, {"tensor": 2}, 4176, 48),
        (replace(LATENT, latent_q=0), {}, 8064, 48),
    ],
)
def test_weights_and_cache_of_the_fullest_rank_are_counted_exactly(
    shape: ModelShape, split: dict[str, int], weights: int, kv_per_token: int
) -> None:
    need = memory_need(shape, **split)
    assert (need.weights, need.kv_per_token) == (weights, kv_per_token)


@pytest.mark.parametrize(("tensor", "workspace"), [(1, 141_672), (2, 72_936), (4, 40_168)])
def test_the_workspace_is_the_runtime_one_full_step_and_its_logits(tensor: int, workspace: int) -> None:
    assert memory_need(SMALL, tensor=tensor, batched_tokens=100, runtime_bytes=1000).workspace == workspace


def test_unasked_vllms_defaults_are_planned_with() -> None:
    need = memory_need(SMALL)
    assert need.workspace == 3 * GIB // 2 + 8192 * 48 * 2 + 131_072
    assert need.utilisation == 0.92


@pytest.mark.parametrize(
    ("positions", "asked", "tokens"), [(0, None, 2048), (100, None, 100), (100, 10, 10), (0, 10, 10)]
)
def test_one_request_of_full_length_must_fit_the_cache(positions: int, asked: int | None, tokens: int) -> None:
    need = memory_need(replace(SMALL, max_positions=positions), max_model_len=asked)
    assert need.kv_least == 64 * tokens


def test_a_device_must_hold_weights_workspace_and_cache_inside_the_utilisation() -> None:
    assert MemoryNeed(weights=100, workspace=50, kv_per_token=8, kv_least=30, utilisation=0.9).device == 200


@pytest.mark.parametrize(
    ("device", "kv_per_token", "tokens"), [(1000, 8, 93), (1000, 1, 750), (1000, 0, 0), (166, 8, -1), (168, 8, 0)]
)
def test_what_weights_and_workspace_leave_is_cache(device: int, kv_per_token: int, tokens: int) -> None:
    assert MemoryNeed(100, 50, kv_per_token, 30, 0.9).kv_tokens(device) == tokens


@pytest.mark.parametrize(
    ("shape", "total", "active"),
    [
        (SMALL, 7168, 7168.0),
        (replace(SMALL, total_bytes=9000), 9000, 9000.0),
        (MIXED, 6784, 5632.0),
        (replace(MIXED, total_bytes=10_000), 10_000, 8848.0),
        (replace(MIXED, active_experts=0), 6784, 6784.0),
        (replace(MIXED, active_experts=1), 6784, 5056.0),
        (replace(SMALL, active_experts=2, expert_intermediate=4), 7168, 7168.0),
    ],
)
def test_all_weights_and_those_that_a_step_reads_are_counted_exactly(
    shape: ModelShape, total: int, active: float
) -> None:
    assert (weight_total(shape), active_bytes(shape)) == (total, active)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "latent_kv", "sizes"),
    [
        (6, 4, 0, (1, 2)),
        (6, 4, 8, (1, 2, 3, 6)),
        (4, 2, 0, (1, 2, 4)),
        (1, 1, 0, (1,)),
        (8, 1, 0, (1, 2, 4, 8)),
    ],
)
def test_a_latent_cache_asks_nothing_of_the_kv_heads(
    heads: int, kv_heads: int, latent_kv: int, sizes: tuple[int, ...]
) -> None:
    assert tensor_sizes(replace(SMALL, heads=heads, kv_heads=kv_heads, latent_kv=latent_kv)) == sizes


NO_EXPERTS = "parallel.expert: 2 is not allowed; the model has no experts, so 1"
TENSOR = "it must divide 4 attention heads and go evenly with 2 KV heads: one of 1, 2, 4"


@pytest.mark.parametrize(
    ("experts", "sizes", "problems"),
    [
        (0, {"tensor": 4, "pipeline": 4, "data": 1, "expert": 1}, ()),
        (4, {"expert": 4}, ()),
        (4, {"expert": 5}, ("parallel.expert: 5 is not allowed; at most the 4 experts",)),
        (1, {"expert": 1}, ()),
        (1, {"expert": 2}, ("parallel.expert: 2 is not allowed; at most the 1 experts",)),
        (0, {"expert": 2}, (NO_EXPERTS,)),
        (0, {"pipeline": 5}, ("parallel.pipeline: 5 is not allowed; at most the 4 layers",)),
        (0, {"data": 0}, ("parallel.data: 0 is not allowed; at least 1",)),
        (0, {"tensor": 0}, (f"parallel.tensor: 0 is not allowed; {TENSOR}",)),
        (0, {"tensor": 8, "expert": 2}, (f"parallel.tensor: 8 is not allowed; {TENSOR}", NO_EXPERTS)),
    ],
)
def test_every_size_is_checked_at_its_bound(experts: int, sizes: dict[str, int], problems: tuple[str, ...]) -> None:
    assert parallel_problems(replace(SMALL, experts=experts), **sizes) == problems


def test_an_odd_split_rounds_down_to_whole_values() -> None:
    odd = replace(SMALL, intermediate=25, hidden=2, vocab=33)
    assert memory_need(odd, tensor=4, batched_tokens=10, runtime_bytes=0).workspace == 10 * 12 * 2 + 1024 * 8 * 4
    assert memory_need(replace(SMALL, kv_heads=6), tensor=4).kv_per_token == 32


def test_no_size_asked_for_is_one_of_each() -> None:
    assert parallel_problems(replace(SMALL, layers=1, heads=1, kv_heads=1, experts=0)) == ()


def test_a_tied_head_has_a_copy_on_the_last_of_two_stages() -> None:
    heavy_end = replace(MIXED, layers=2, expert_intermediate=8, tied_head=True)
    assert memory_need(heavy_end, pipeline=2).weights == 384 + 1984 + 512
