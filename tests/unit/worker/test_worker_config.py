"""The worker's configuration refuses what contradicts itself."""

from __future__ import annotations

import pydantic
import pytest

from megatoken.worker.config import FaultConfig, WorkerConfig

BASE = {"replica": "r", "model": "m", "counters_dir": "/nowhere"}


def test_defaults_make_a_simulated_worker() -> None:
    config = WorkerConfig.model_validate({**BASE, "engine": "simulated", "simulated": {}})
    assert config.host == "127.0.0.1"
    assert config.world_size == 1
    assert WorkerConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "source is needed"),
        ({"engine": "simulated"}, "simulated is needed"),
        ({"source": "x", "placement_group_id": "ab"}, "go together"),
        (
            {"source": "x", "placement_group_id": "ab", "ray_address": "h:1", "rank_devices": (0, 1)},
            "rank_devices: 2 devices for 1 ranks",
        ),
        ({"source": "x", "ray_address": "a:1"}, "go together"),
        ({"source": "x", "tensor_parallel": 2, "expert_parallel": True}, "expert_parallel is not allowed on CPU"),
        ({"source": "x", "unknown": 1}, "unknown"),
        ({"source": "x", "port": 70_000}, "port"),
        ({"source": "x", "tensor_parallel": 0}, "tensor_parallel"),
        ({"source": "x", "engine": "gpt"}, "engine"),
    ],
)
def test_what_does_not_fit_is_told(fields: dict, says: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=says):
        WorkerConfig.model_validate({**BASE, **fields})


def test_a_fault_has_one_trigger() -> None:
    assert FaultConfig(kind="die", after_s=1).after_tokens is None
    for fields in ({}, {"after_s": 1, "after_tokens": 1}):
        with pytest.raises(pydantic.ValidationError, match="exactly one"):
            FaultConfig(kind="die", **fields)


def test_two_incarnations_differ() -> None:
    first, second = (WorkerConfig.model_validate({**BASE, "source": "x"}) for _ in range(2))
    assert first.incarnation != second.incarnation
