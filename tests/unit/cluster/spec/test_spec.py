"""The spec: what is allowed, and the one line for each thing that is not."""

import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megatoken.cluster.planning.check import device_problems, model_problems
from megatoken.cluster.spec.cluster import ClusterSpec, default_spec
from megatoken.cluster.spec.load import MAX_SPEC_BYTES, SpecError, dump_spec, load_spec
from megatoken.cluster.spec.model import ModelSpec


def problems(text: str) -> str:
    with pytest.raises(SpecError) as raised:
        load_spec(text)
    return str(raised.value)


def complaints(text: str) -> tuple[str, ...] | None:
    """What is wrong with a text; None: nothing."""
    try:
        load_spec(text)
    except SpecError as error:
        return error.problems
    return None


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (
            "models: [{name: a, source: x, replicas: -1}]",
            "models.a.replicas: -1 is not allowed; greater than or equal to 0",
        ),
        ("models: [{name: a, source: x, parallel: {tensor: 0}}]", "models.a.parallel.tensor: 0 is not allowed"),
        ("models: [{name: a, source: x, colour: red}]", "models.a.colour: is not a field"),
        ("models: [{name: a}]", "models.a: source is missing"),
        ("models: [{source: x}]", "models.0.name: is missing"),
        ("models: [{name: a, source: x}, {name: a, source: y}]", "the name 'a' is given 2 times"),
        ("models: [{name: a, source: x, served_names: [b]}, {name: b, source: y}]", "the name 'b' is given 2 times"),
        ("models: [{name: a, source: x, simulated: {}}]", "engine is 'vllm'"),
        ("models: [{name: a, source: x, policy: best}]", "policy: 'best' is not allowed; least_tokens, round_robin"),
        ("models: [{name: a, source: x, parallel: {expert: 3, tensor: 2}}]", "expert: 3 is not allowed; 1, or"),
        (
            "models: [{name: a, source: x, parallel: {expert: 2, tensor: 2}}]",
            "parallel.expert: 2 needs placement.device_kinds that name accelerators; vLLM 0.32's CPU kernels crash",
        ),
        (
            "models: [{name: a, source: x, parallel: {expert: 2, tensor: 2}, placement: {device_kinds: [h200, cpu]}}]",
            "parallel.expert: 2 needs placement.device_kinds",
        ),
        (
            "models: [{name: a, source: x, engine_args: {enable-expert-parallel: true}}]",
            "enable-expert-parallel is not allowed; use parallel.expert",
        ),
        (
            "models: [{name: a, source: x, parallel: {data: 2}}]",
            "parallel: data: 2 is not allowed; one replica",
        ),
        (
            "models: [{name: a, source: x, engine_args: {data-parallel-size: 2}}]",
            "data-parallel-size is not allowed; one",
        ),
        (
            "models: [{name: a, source: x, engine_args: {enable_lora: true}}]",
            "enable_lora is not allowed; adapters are",
        ),
        (
            "models: [{name: a, source: x, engine_args: {lora_modules: {b: /b}}}]",
            "lora_modules is not allowed; adapters",
        ),
        ("models: [{name: a, source: x, engine_args: {--max-loras: 2}}]", "merge each into its base model"),
        (
            "models: [{name: a, source: x, env: {HIP_VISIBLE_DEVICES: '1'}}]",
            "env.HIP_VISIBLE_DEVICES is not allowed; the plan chooses devices",
        ),
        ("network: {env: {ROCR_VISIBLE_DEVICES: '1'}}", "env.ROCR_VISIBLE_DEVICES is not allowed; the plan chooses"),
        ("models: [{name: a, source: x, policy: lora}]", "policy: 'lora' is not allowed; adapters are not served"),
        ("routers: {policy: lora}", "routers.policy: 'lora' is not allowed; adapters are not served"),
        ("models: [{name: a, source: x, placement: {anti_affinity: [z]}}]", "anti_affinity: 'z' is not allowed"),
        ("models: [{name: '-a', source: x}]", "is not allowed"),
        ("routers: {policy: best}", "routers.policy: 'best' is not allowed; least_tokens, round_robin"),
        ("routers: {port: 8000}", "edge.port: 8000 is not allowed; routers.port has that port already"),
        ("routers: {port: 70000}", "routers.port: 70000 is not allowed; less than or equal to 65535"),
        ("routers: {count: 0}", "an edge needs a router"),
        ("agents: {tick_s: 5, deadline_s: 1}", "agents.deadline_s: 1.0 is not allowed; at least tick_s = 5.0"),
        ("cluster: Not Good", "cluster: 'Not Good' is not allowed"),
        ("ray: {address: 'nowhere'}", "ray.address: 'nowhere' is not allowed"),
        ("a: 1\na: 2", "key 'a' is given twice"),
        ("1: 2", "key 1 is not text"),
        ("- 1", "a mapping"),
        ("", "None is not allowed; a mapping"),
        ("{", "not YAML"),
        ("a: !!python/object/apply:os.system [x]", "not YAML"),
    ],
)
def test_what_is_wrong_is_named(text: str, complaint: str) -> None:
    assert complaint in problems(text)


def test_every_problem_has_a_line() -> None:
    lines = problems("cluster: X\nmodels: [{name: a, source: x, replicas: -1, kv_cache_gib: 0}]").splitlines()
    assert [line.partition(":")[0] for line in lines] == ["cluster", "models.a.replicas", "models.a.kv_cache_gib"]


def test_every_field_says_what_it_is() -> None:
    def undescribed(part: type) -> list[str]:
        found = []
        for name, field in part.model_fields.items():  # type: ignore[attr-defined]
            inner = field.annotation
            if isinstance(inner, type) and hasattr(inner, "model_fields") and inner.__module__.startswith("cluster."):
                found += undescribed(inner)
            elif not field.description and not hasattr(inner, "model_fields"):
                found.append(f"{part.__name__}.{name}")
        return found

    assert undescribed(ClusterSpec) + undescribed(ModelSpec) == []


def test_a_spec_survives_its_text() -> None:
    spec = default_spec().with_replicas("smollm2-135m-instruct", 7)
    assert load_spec(dump_spec(spec)) == spec


@settings(max_examples=300, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(
                st.sampled_from(["cluster", "models", "name", "routers", "port", "ray", "x"]), inner, max_size=4
            )
        ),
        max_leaves=12,
    )
)
def test_no_document_crashes_it(document: object) -> None:
    found = complaints(yaml.safe_dump(document))
    assert found is None or (found and all(len(line) < 400 for line in found))


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=200))
def test_no_text_crashes_it(text: str) -> None:
    assert complaints(text) is None or complaints(text)


def test_the_revision_changes_with_what_runs_and_not_with_how_many() -> None:
    model = default_spec().models[0]
    assert model.model_copy(update={"replicas": 9, "drain_timeout_s": 1.0}).revision == model.revision
    assert model.model_copy(update={"dtype": "float32"}).revision != model.revision
    assert model.model_copy(update={"engine_args": {"seed": 1}}).revision != model.revision


def test_sizes_that_the_model_does_not_allow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGATOKEN_CACHE", str(tmp_path))
    directory = tmp_path / "models" / "smollm2-135m-instruct"
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(
        '{"num_hidden_layers": 30, "hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3,'
        ' "vocab_size": 49152, "intermediate_size": 1536, "max_position_embeddings": 8192}'
    )
    model = {"name": "a", "source": "builtin:smollm2-135m-instruct"}

    def found(**changes: object) -> list[str]:
        return model_problems(ClusterSpec.model_validate({"models": [{**model, **changes}]}))

    assert found() == []
    assert found(parallel={"tensor": 3}) == []
    assert "models.a.parallel.tensor: 2 is not allowed" in found(parallel={"tensor": 2})[0]
    assert "models.a.parallel.pipeline: 31 is not allowed; at most the 30 layers" in found(parallel={"pipeline": 31})[0]
    assert "models.a.max_model_len: 9000 is not allowed; at most the model's 8192" in found(max_model_len=9000)[0]
    assert "built-in models are" in found(source="builtin:gpt-9")[0]
    assert "a directory with a model" in found(source="/no/such/model")[0]


@pytest.mark.parametrize("elsewhere", [{"launch": {"ssh": {}}}, {"ray": {"address": "10.0.0.1:6379"}}])
def test_a_model_directory_need_not_be_where_the_command_runs_if_the_cluster_is_elsewhere(
    elsewhere: dict[str, object],
) -> None:
    models = [{"name": "a", "source": "/no/such/model"}]
    assert model_problems(ClusterSpec.model_validate({"models": models, **elsewhere})) == []


def test_a_replica_wider_than_the_local_machine() -> None:
    spec = load_spec("ray: {cpu_devices: 2}\nmodels: [{name: a, source: x, parallel: {pipeline: 3}}]")
    assert "3 devices a replica is not allowed; ray.cpu_devices gives this cluster 2" in device_problems(spec)[0]


def test_aliases_that_grow_without_end_are_refused_at_once() -> None:
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 8)]
    began = time.monotonic()
    with pytest.raises(SpecError, match="values once its aliases are written out is not allowed"):
        load_spec("\n".join([*levels, "cluster: *a7", "models: [{name: m, engine_args: {a: *a7}}]"]))
    with pytest.raises(SpecError, match="an alias stands inside what it names"):
        load_spec("cluster: &a [*a]")
    assert time.monotonic() - began < 0.5
    assert load_spec("models: [{name: m, engine: &e simulated}, {name: n, engine: *e}]").models[1].engine == "simulated"


@pytest.mark.parametrize("opening", ["[", "{a: ", "[{a: ", "\n- - ", "\n? "])
def test_what_is_too_deep_is_refused_while_it_is_read(opening: str) -> None:
    began = time.process_time()
    text = opening.strip("\n") + " "
    assert "lists and mappings inside each other" in problems(
        text * 60_000 if opening[0] == "\n" else f"models: {opening * 60_000}"
    )
    assert time.process_time() - began < 0.5


def test_ten_thousand_models_fit_and_are_read_in_seconds() -> None:
    models = (f"- {{name: model-{n:05d}, source: org/model-{n:05d}-instruct, replicas: 2}}\n" for n in range(10_000))
    text = "models:\n" + "".join(models)
    began = time.process_time()
    assert len(load_spec(text).models) == 10_000
    assert time.process_time() - began < 10


def test_a_spec_over_the_limit_is_refused_by_its_bytes() -> None:
    text = "models: [{name: a, source: x}] # "
    assert load_spec(text + "x" * (MAX_SPEC_BYTES - len(text))).models
    assert f"{MAX_SPEC_BYTES + 1} bytes is not allowed" in problems(text + "x" * (MAX_SPEC_BYTES - len(text) + 1))
    assert "bytes is not allowed" in problems(text + "\N{EURO SIGN}" * (MAX_SPEC_BYTES // 3))


def test_half_a_surrogate_pair_is_a_problem_of_the_spec() -> None:
    assert problems("cluster: \ud800")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cluster: !!timestamp 2020-01-00", "2020-01-00' is not allowed; day is out of range"),
        ("cluster: " + "1" * 5000, "is not allowed; Exceeds the limit"),
        ("cluster: !!int x", "'x' is not allowed; invalid literal"),
    ],
)
def test_values_that_yaml_itself_cannot_make_are_told_with_their_place(text: str, said: str) -> None:
    with pytest.raises(SpecError, match=r"^spec: not YAML: ") as refused:
        load_spec(text)
    assert said in str(refused.value)
    assert "line 1" in str(refused.value)


def test_what_looks_like_a_date_is_text() -> None:
    assert load_spec("models: [{name: 2026-11-27, engine: simulated}]").models[0].name == "2026-11-27"
