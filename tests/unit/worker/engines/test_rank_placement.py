"""What a worker sets for an engine of several ranks, inside a node and across nodes; one rank needs nothing."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatoken.worker.config import WorkerConfig
from megatoken.worker.engines.ranks import cpu_platform_plugin
from megatoken.worker.engines.ranks import placement as rank_placement

OWN = {"MEGATOKEN_REPLICA": "r", "MEGATOKEN_LOST_RANKS": "/r.lost"}
GROUP = {"ray_address": "10.0.0.1:6379", "placement_group_id": "ab" * 18}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What the modules under test see as the process environment: at first nothing."""
    seen: dict[str, str] = {}
    for module in (rank_placement, cpu_platform_plugin):
        monkeypatch.setattr(module, "os", SimpleNamespace(environ=seen))
    return seen


def config(**more: Any) -> WorkerConfig:
    ranks = more.get("tensor_parallel", 1) * more.get("pipeline_parallel", 1)
    if "ray_address" in more:
        more = {"rank_devices": tuple(range(ranks)), **more}
    return WorkerConfig.model_validate(
        {"replica": "r", "model": "m", "source": "builtin:tiny-llama", "counters_dir": "/c", "host": "10.0.0.2", **more}
    )


def test_one_rank_needs_nothing_and_keeps_vllms_platform_and_executor(environment: dict[str, str]) -> None:
    rank_placement.prepare_environment(config())
    assert environment == {}
    assert cpu_platform_plugin.activate() is None
    assert rank_placement.executor_class(config()) is None


def test_ranks_inside_a_node_need_no_ray(environment: dict[str, str]) -> None:
    rank_placement.prepare_environment(config(tensor_parallel=2))
    assert environment == {"MEGATOKEN_CPU_RAY_DEVICE": "cpu_device", **OWN}
    assert cpu_platform_plugin.activate() == cpu_platform_plugin.PLATFORM


def test_ranks_inside_a_node_of_accelerators_keep_vllms_platform(environment: dict[str, str]) -> None:
    rank_placement.prepare_environment(config(tensor_parallel=2, device_kind="mi355x"))
    assert environment == OWN
    assert cpu_platform_plugin.activate() is None


def test_ranks_across_nodes_are_in_bundle_order_on_their_planned_devices(environment: dict[str, str]) -> None:
    across = config(**GROUP, tensor_parallel=2, pipeline_parallel=2, rank_devices=(4, 5, 0, 1))
    rank_placement.prepare_environment(across)
    assert environment["RAY_ADDRESS"] == "10.0.0.1:6379"
    assert environment["VLLM_RAY_BUNDLE_INDICES"] == "0,1,2,3"
    assert environment["MEGATOKEN_RANK_DEVICES"] == "4,5,0,1"
    assert environment["VLLM_HOST_IP"] == "10.0.0.2"
    assert cpu_platform_plugin.activate() == cpu_platform_plugin.PLATFORM


def test_ranks_across_nodes_of_accelerators_keep_vllms_platform(environment: dict[str, str]) -> None:
    rank_placement.prepare_environment(config(**GROUP, device_kind="mi355x", pipeline_parallel=2))
    assert environment["VLLM_RAY_BUNDLE_INDICES"] == "0,1"
    assert cpu_platform_plugin.activate() is None


def test_the_operators_own_address_stands(environment: dict[str, str]) -> None:
    environment["VLLM_HOST_IP"] = "192.168.7.7"
    rank_placement.prepare_environment(config(**GROUP, pipeline_parallel=2))
    assert environment["VLLM_HOST_IP"] == "192.168.7.7"


@pytest.mark.parametrize(("written", "ranks"), [("3", [3]), ("0 2", [0, 2]), ("", []), ("x", []), (None, [])])
def test_a_lost_rank_is_read_once(tmp_path: Path, written: str | None, ranks: list[int]) -> None:
    own = config(counters_dir=str(tmp_path / "counters"), tensor_parallel=2)
    if written is not None:
        (tmp_path / "r.lost").write_text(written)
    assert rank_placement.lost_ranks(own) == ranks
    assert rank_placement.lost_ranks(own) == []
