"""What a worker sets for an engine in a placement group, and that it sets nothing otherwise."""

from types import SimpleNamespace

import pytest

from megatoken.worker.config import WorkerConfig
from megatoken.worker.engines.ranks import cpu_platform_plugin
from megatoken.worker.engines.ranks import placement as rank_placement

GROUP = {"ray_address": "10.0.0.1:6379", "placement_group_id": "ab" * 18}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What the modules under test see as the process environment: at first nothing."""
    seen: dict[str, str] = {}
    for module in (rank_placement, cpu_platform_plugin):
        monkeypatch.setattr(module, "os", SimpleNamespace(environ=seen))
    return seen


def config(**more: object) -> WorkerConfig:
    return WorkerConfig.model_validate(
        {"replica": "r", "model": "m", "source": "builtin:tiny-llama", "counters_dir": "/c", "host": "10.0.0.2", **more}
    )


def test_without_a_group_nothing_is_set_and_vllm_keeps_its_platform_and_executor(environment: dict[str, str]) -> None:
    rank_placement.prepare_environment(config())
    assert environment == {}
    assert cpu_platform_plugin.activate() is None
    assert rank_placement.executor_class(config()) is None


def test_a_cpu_replica_gets_its_ranks_in_bundle_order_and_our_platform(environment: dict[str, str]) -> None:
    rank_placement.prepare_environment(config(**GROUP, tensor_parallel=2, pipeline_parallel=2))
    assert environment["RAY_ADDRESS"] == "10.0.0.1:6379"
    assert environment["VLLM_RAY_BUNDLE_INDICES"] == "0,1,2,3"
    assert environment["VLLM_HOST_IP"] == "10.0.0.2"
    assert cpu_platform_plugin.activate() == cpu_platform_plugin.PLATFORM


def test_a_replica_on_accelerators_keeps_vllms_platform(environment: dict[str, str]) -> None:
    rank_placement.prepare_environment(config(**GROUP, device_kind="mi355x", pipeline_parallel=2))
    assert environment["VLLM_RAY_BUNDLE_INDICES"] == "0,1"
    assert cpu_platform_plugin.activate() is None


def test_the_operators_own_address_stands(environment: dict[str, str]) -> None:
    environment["VLLM_HOST_IP"] = "192.168.7.7"
    rank_placement.prepare_environment(config(**GROUP))
    assert environment["VLLM_HOST_IP"] == "192.168.7.7"
