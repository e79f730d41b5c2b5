"""What is read from a config.json: which field decides what, and what stands where a field is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatoken.cluster.inventory.model_shape import MAX_CONFIG_BYTES, ModelShape, ShapeError, load_shape, read_shape

LEAST = {"num_hidden_layers": 1, "hidden_size": 10, "num_attention_heads": 3, "vocab_size": 1}


def test_a_config_of_the_least_fields_gets_the_documented_defaults() -> None:
    assert read_shape(LEAST) == ModelShape(
        layers=1, hidden=10, heads=3, kv_heads=3, head_dim=3, vocab=1, intermediate=40, weight_bytes=2, cache_bytes=2
    )


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"head_dim": 7}, {"head_dim": 7}),
        ({"v_head_dim": 5}, {"head_dim": 5}),
        ({"head_dim": 7, "v_head_dim": 5}, {"head_dim": 7}),
        ({"num_key_value_heads": 1}, {"kv_heads": 1}),
        ({"num_key_value_heads": True}, {"kv_heads": 3}),
        ({"n_inner": 21}, {"intermediate": 21}),
        ({"intermediate_size": 20, "n_inner": 21}, {"intermediate": 20}),
        ({"n_positions": 64}, {"max_positions": 64}),
        ({"tie_word_embeddings": True}, {"tied_head": True}),
        ({"moe_intermediate_size": 9}, {"expert_intermediate": 9}),
        ({"num_experts": 4, "intermediate_size": 20}, {"experts": 4, "expert_intermediate": 20}),
        ({"num_experts": 4, "moe_intermediate_size": 9}, {"experts": 4, "expert_intermediate": 9}),
        ({"intermediate_size": 20}, {"experts": 0, "expert_intermediate": 0}),
        ({"first_k_dense_replace": 2}, {"dense_layers": 0}),
        ({"first_k_dense_replace": 2, "num_experts": 4}, {"dense_layers": 2}),
        ({"qk_rope_head_dim": 2, "q_lora_rank": 5}, {"latent_kv": 0, "latent_q": 0}),
        ({"kv_lora_rank": 6, "qk_rope_head_dim": 2, "q_lora_rank": 5}, {"latent_kv": 8, "latent_q": 5}),
        ({"kv_lora_rank": 6}, {"latent_kv": 6, "latent_q": 0}),
        ({"experts_per_token": 3, "n_shared_experts": 2}, {"active_experts": 3, "shared_experts": 2}),
    ],
)
def test_each_field_decides_its_size(fields: dict[str, object], expected: dict[str, object]) -> None:
    shape = read_shape(LEAST | fields)
    assert {name: getattr(shape, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("inner", "outer", "dtype", "run_bytes"),
    [
        ({}, {}, "auto", 2.0),
        ({"dtype": "float32"}, {}, "auto", 4.0),
        ({"torch_dtype": "float32"}, {}, "auto", 4.0),
        ({}, {"torch_dtype": "float32"}, "auto", 4.0),
        ({"dtype": "float32"}, {"torch_dtype": "int8"}, "auto", 4.0),
        ({"dtype": "float32", "torch_dtype": "int8"}, {}, "auto", 4.0),
        ({"torch_dtype": "float32"}, {"torch_dtype": "int8"}, "auto", 4.0),
        ({"torch_dtype": "torch.float32"}, {}, "auto", 4.0),
        ({"dtype": "float32"}, {}, "int8", 1.0),
        ({"dtype": "float32"}, {}, "unheard-of", 2.0),
        ({"dtype": "unheard-of"}, {}, "auto", 2.0),
    ],
)
def test_the_dtype_is_the_specs_then_the_text_configs_then_the_whole_ones(
    inner: dict[str, object], outer: dict[str, object], dtype: str, run_bytes: float
) -> None:
    shape = read_shape({"text_config": LEAST | inner, **outer}, dtype=dtype)
    assert (shape.weight_bytes, shape.cache_bytes) == (run_bytes, run_bytes)


@pytest.mark.parametrize(("tied", "expected"), [({}, False), ({"tie_word_embeddings": True}, True)])
def test_a_tied_head_may_be_said_outside_the_text_config(tied: dict[str, object], expected: bool) -> None:
    assert read_shape({"text_config": LEAST, **tied}).tied_head is expected
    assert read_shape({"text_config": LEAST | {"tie_word_embeddings": False}, **tied}).tied_head is False


@pytest.mark.parametrize(
    ("quantisation", "bits"),
    [
        ({"bits": 4}, 4.5),
        ({"bits": 1}, 1.5),
        ({"bits": 0, "quant_method": "fp8"}, 8.0),
        ({"bits": 8, "quant_method": "fp8"}, 8.5),
        ({"quant_method": "FP8"}, 8.0),
        ({"quant_method": "mxfp4"}, 4.25),
        ({"quant_method": "unheard-of"}, 16.0),
        ({}, 16.0),
        ("none", 16.0),
    ],
)
def test_quantised_weights_take_their_bits_and_the_cache_stays(quantisation: object, bits: float) -> None:
    shape = read_shape(LEAST | {"quantization_config": quantisation})
    assert (shape.weight_bytes, shape.cache_bytes) == (bits / 8, 2.0)


@pytest.mark.parametrize("field", LEAST)
def test_a_size_below_one_is_refused_by_name(field: str) -> None:
    with pytest.raises(ShapeError, match=f"^config.json: {field} is missing or not a positive number$"):
        read_shape(LEAST | {field: 0})


def test_a_config_that_is_no_object_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ShapeError, match="not an object"):
        load_shape(tmp_path)


def test_a_config_as_large_as_allowed_is_read_and_one_byte_more_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LEAST).ljust(MAX_CONFIG_BYTES))
    assert load_shape(tmp_path) == read_shape(LEAST)
    path.write_text(json.dumps(LEAST).ljust(MAX_CONFIG_BYTES + 1))
    with pytest.raises(ShapeError, match="16777217 bytes is not allowed; at most 16777216"):
        load_shape(tmp_path)


@pytest.mark.parametrize(
    ("index", "total"),
    [
        (None, 0),
        ("{", 0),
        ("[]", 0),
        ('{"metadata": {}}', 0),
        ('{"metadata": {"total_size": "x"}}', 0),
        ('{"metadata": {"total_size": 77}}', 77),
    ],
)
def test_an_index_without_a_size_leaves_the_formula(tmp_path: Path, index: str | None, total: int) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LEAST))
    if index is not None:
        (tmp_path / "model.safetensors.index.json").write_text(index)
    assert load_shape(tmp_path, "float32") == read_shape(LEAST, dtype="float32", total_bytes=total)
