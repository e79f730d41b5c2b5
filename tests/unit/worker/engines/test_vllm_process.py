"""The environment that a worker gives vLLM."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from megatoken.worker.config import WorkerConfig
from megatoken.worker.engines.vllm.process import prepare_process


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The process's own, empty, and put back afterwards."""
    seen: dict[str, str] = {}
    monkeypatch.setattr(os, "environ", seen)
    return seen


def config(counters_dir: Path | str, **more: Any) -> WorkerConfig:
    values = {"replica": "r", "model": "m", "source": "builtin:tiny-llama", "counters_dir": str(counters_dir), **more}
    return WorkerConfig.model_validate(values)


def test_cpu_ranks_share_the_cores(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)))
    prepare_process(config("/c", cpu_ranks=4))
    assert environment["OMP_NUM_THREADS"] == "2"
    prepare_process(config("/c", cpu_ranks=4, cpu_threads=7))
    assert environment["OMP_NUM_THREADS"] == "7"
    prepare_process(config("/c", tensor_parallel=2))
    assert environment["OMP_NUM_THREADS"] == "4"


@pytest.mark.parametrize(
    ("more", "given", "spins"),
    [
        ({}, {}, True),
        ({"cpu_threads": 4}, {}, False),  # perhaps more than there are cores
        ({}, {"OMP_WAIT_POLICY": "active"}, False),
        ({"device_kind": "h200"}, {}, False),
    ],
)
def test_threads_that_have_a_core_each_spin_for_a_moment(
    environment: dict[str, str], more: dict[str, Any], given: dict[str, str], spins: bool
) -> None:
    environment |= given
    prepare_process(config("/c", **more))
    assert ("GOMP_SPINCOUNT" in environment) == spins


def test_an_accelerators_threads_are_its_own_affair(environment: dict[str, str]) -> None:
    prepare_process(config("/c", device_kind="mi355x"))
    assert "OMP_NUM_THREADS" not in environment
    assert environment["VLLM_ENGINE_READY_TIMEOUT_S"] == "900"


def test_what_the_operator_set_stands(environment: dict[str, str]) -> None:
    environment |= {"OMP_WAIT_POLICY": "active", "VLLM_RPC_BASE_PATH": "/mine"}
    prepare_process(config("/c"))
    assert (environment["OMP_WAIT_POLICY"], environment["VLLM_RPC_BASE_PATH"]) == ("active", "/mine")


def test_sockets_lie_with_the_cluster_where_their_names_have_room(environment: dict[str, str], tmp_path: Path) -> None:
    short, long = Path(f"/tmp/mt-{os.getpid()}"), tmp_path / ("x" * 80)
    for directory in (short, long):
        directory.mkdir()
    try:
        prepare_process(config(long / "counters"))
        assert "VLLM_RPC_BASE_PATH" not in environment
        prepare_process(config(short / "counters"))
        assert environment["VLLM_RPC_BASE_PATH"] == str(short)
    finally:
        short.rmdir()
