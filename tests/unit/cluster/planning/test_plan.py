"""What `megatoken plan` says: placements, blocked ones, unused devices, alternatives; and its inventory file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatoken.cluster.cli.__main__ import main
from megatoken.cluster.inventory.model_shape import read_shape
from megatoken.cluster.planning.order import rate_of
from megatoken.cluster.planning.plan import plan_cluster
from megatoken.cluster.planning.print import plan_json, plan_text, span
from megatoken.cluster.planning.topology_file import load_inventory
from megatoken.cluster.ray.live import live_inventory
from megatoken.cluster.spec.load import SpecError, parse_spec
from megatoken.v1 import control_pb2

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
NODES = {"nodes": [{"id": "n{n}", "count": 3, "devices": 8, "device_kind": "mi355x", "device_memory_gib": 288}]}


@pytest.fixture
def nodes_file(tmp_path: Path) -> Path:
    path = tmp_path / "nodes.json"
    path.write_text(json.dumps(NODES))
    return path


@pytest.fixture
def spec_file(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(LLAMA2_70B))
    path = tmp_path / "spec.yaml"
    path.write_text(
        f"models: [{{name: chat, source: {tmp_path / 'model'}, replicas: 2, parallel: {{tensor: 8, pipeline: 2}}}}]"
    )
    return path


def run(*arguments: str) -> int:
    return main(["plan", *arguments])


def test_plan_prints_ranks_blocked_unused_and_alternatives(
    spec_file: Path, nodes_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("-f", str(spec_file), "--inventory", str(nodes_file)) == 3
    text = capsys.readouterr().out
    assert "n0" in text
    assert "chat-0  ranks 0-7 (stage 0)" in text
    assert "chat-0  ranks 8-15 (stage 1)" in text
    assert "chat: 1 of 2 replicas are blocked" in text
    assert "Free or add 8 devices in whole TP groups of 8" in text
    assert "unused: 8 of 24 devices: n2 0-7" in text
    assert "->  TP 8 x PP 2" in text


def test_json_has_every_rank(spec_file: Path, nodes_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("-f", str(spec_file), "--inventory", str(nodes_file), "--json")
    plan = json.loads(capsys.readouterr().out)
    assert not plan["complete"]
    assert [rank["rank"] for rank in plan["placements"][0]["ranks"]] == list(range(16))
    assert plan["models"][0]["blocked"][0]["unblock"]
    assert len(plan["unused"]) == 8


def test_a_spec_that_fits_exits_zero(spec_file: Path, tmp_path: Path) -> None:
    inventory = tmp_path / "more.json"
    inventory.write_text(json.dumps({"nodes": [{**NODES["nodes"][0], "count": 4}]}))
    assert run("-f", str(spec_file), "--inventory", str(inventory)) == 0


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "neither JSON nor YAML"),
        ("nodes: []", "nodes: "),
        ("nodes: [{id: a, devices: -1}]", "nodes.0.devices: Input should be greater than or equal to 0"),
        ("nodes: [{id: a, devices: 8, gpus: 1}]", "nodes.0.gpus: Extra inputs are not permitted"),
        ("nodes: [{id: a, count: 2, devices: 8}]", "id: 'a' is given twice"),
        ("nodes: [{id: a, devices: 8, link_domains: [4, 3]}]", "sizes that add up to 8"),
        ("nodes: [{id: a, devices: 8, out: {9: bad}}]", "a device from 0 to 7"),
    ],
)
def test_a_wrong_inventory_is_named(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "nodes.yaml"
    path.write_text(content)
    with pytest.raises(SpecError) as caught:
        load_inventory(path)
    assert said in str(caught.value)


def test_a_missing_file_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("-f", str(tmp_path / "none.yaml")) == 2
    assert "none.yaml' cannot be read" in capsys.readouterr().err


def test_impossible_sizes_block_with_what_is_allowed(nodes_file: Path) -> None:
    spec = parse_spec({"models": [{"name": "chat", "source": "x", "parallel": {"tensor": 3}}]})
    plan = plan_cluster(spec, load_inventory(nodes_file), {"chat": read_shape(LLAMA2_70B)})
    assert not plan.complete
    assert plan_json(plan)["models"][0]["problems"][0].startswith("parallel.tensor: 3 is not allowed")
    assert "one of 1, 2, 4, 8" in plan_text(plan)


def test_alternatives_are_only_those_that_fit_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "small.json"
    path.write_text(json.dumps({"nodes": [{"id": "a", "devices": 8, "device_kind": "h100", "device_memory_gib": 80}]}))
    spec = parse_spec({"models": [{"name": "chat", "source": "x"}]})
    (model,) = plan_cluster(spec, load_inventory(path), {"chat": read_shape(LLAMA2_70B)}).models
    assert model.alternatives
    assert all(split.tensor * split.pipeline > 1 for split in model.alternatives), "138 GB do not fit on 80 GiB"
    assert all(split.need_bytes <= 80 << 30 for split in model.alternatives)
    assert [split.rate for split in model.alternatives] == sorted((s.rate for s in model.alternatives), reverse=True)


def test_the_alternatives_counts_are_what_placement_finds(nodes_file: Path) -> None:
    inventory = load_inventory(nodes_file)
    shape = read_shape(LLAMA2_70B)
    spec = parse_spec({"models": [{"name": "chat", "source": "x"}]})
    (model,) = plan_cluster(spec, inventory, {"chat": shape}).models
    for split in model.alternatives[:12]:
        sizes = {"tensor": split.tensor, "pipeline": split.pipeline}
        document = {"name": "chat", "source": "x", "parallel": sizes, "replicas": split.replicas}
        assert plan_cluster(parse_spec({"models": [document]}), inventory, {"chat": shape}, alternatives=False).complete
        more = {**document, "replicas": split.replicas + 1}
        assert not plan_cluster(parse_spec({"models": [more]}), inventory, {"chat": shape}, alternatives=False).complete


def test_the_order_prefers_faster_devices_and_no_needless_split() -> None:
    shape = read_shape({**LLAMA2_70B, "num_hidden_layers": 8, "hidden_size": 1024, "intermediate_size": 4096})
    assert rate_of(shape, "mi355x", tensor=1, pipeline=1) > rate_of(shape, "mi300x", tensor=1, pipeline=1)
    one, eight = (rate_of(shape, "mi355x", tensor=size, pipeline=1) for size in (1, 8))
    assert 8 * one > eight


@pytest.mark.parametrize(("numbers", "text"), [([0, 1, 2, 3, 7], "0-3,7"), ([5], "5"), ([], "")])
def test_span(numbers: list[int], text: str) -> None:
    assert span(numbers) == text


def test_a_running_cluster_is_planned_on_as_its_status_tells_it() -> None:
    status = control_pb2.NodeStatus(
        node="gpu-a",
        address="10.0.0.1",
        site="paris",
        state="drained",
        device_kind="mi355x",
        devices=8,
        devices_out=["3: rank died twice here, probe in 40 s"],
        labels={"node_id": "ab12", "rack": "r1", "link_domains": "4-4", "device_memory_gib": "288"},
    )
    (node,) = live_inventory([status]).nodes
    assert (node.id, node.title, node.rack, node.draining, node.alive) == ("ab12", "gpu-a", "r1", True, True)
    assert [device.link_domain for device in node.devices] == ["0"] * 4 + ["1"] * 4
    assert node.devices[3].out == "rank died twice here, probe in 40 s"
    assert [device.healthy for device in node.devices].count(False) == 1
    assert node.devices[0].memory_bytes == 288 << 30


def test_planning_on_a_cluster_that_does_not_run_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MEGATOKEN_STATE_DIR", str(tmp_path))
    assert run("--live") == 1
    assert "no cluster is running" in capsys.readouterr().err
