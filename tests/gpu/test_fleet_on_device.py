"""vLLM on a real accelerator through `megatoken up`, with the agent's collective on the same device.

Skips where torch sees no device. What the agent takes of the device's memory, and what its sums cost the engine beside
it, is printed: docs/decisions.md keeps the figures of the machines that this ran on.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.clusters import RunningCluster, running

QUESTION = "What is the capital of Japan?"
MODEL = "smol"
DEVICES = "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)"
TOKENS = 400


def _devices() -> int:
    done = subprocess.run([sys.executable, "-c", DEVICES], capture_output=True, text=True, timeout=120, check=False)
    return int(done.stdout.split()[-1]) if done.returncode == 0 and done.stdout.split() else 0


pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]


def spec(agents: bool) -> dict[str, Any]:
    return {
        "cluster": "device",
        "ray": {"gpus": 1},
        "control": {"port": 0},
        "routers": {"port": 0},
        "edge": {"count": 0},
        "agents": {"enabled": agents, "backend": "nccl" if agents else "auto"},
        "models": [
            {
                "name": MODEL,
                "source": "builtin:smollm2-135m-instruct",
                "max_model_len": 1024,
                "engine_args": {"gpu_memory_utilization": 0.3},
            }
        ],
    }


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    if not _devices():  # asked here, not at collection: torch takes seconds to import
        pytest.skip("torch sees no CUDA or ROCm device")
    with running(tmp_path_factory.mktemp("device"), spec(agents=True)) as started:
        yield started


def rate(cluster: RunningCluster) -> float:
    """Tokens/s of one greedy stream."""
    began = time.monotonic()
    cluster.run("generate", "--max-tokens", str(TOKENS), "--ignore-eos", QUESTION)
    return TOKENS / (time.monotonic() - began)


def test_it_answers_from_the_device_and_the_collective_counts_there(cluster: RunningCluster) -> None:
    assert "Tokyo" in cluster.run("generate", QUESTION)
    status = cluster.wait(lambda found: found["throughput"]["ranks"] > 0)
    assert status["throughput"]["backend"].startswith("nccl")
    assert status["nodes"][0]["device_kind"] != "cpu"
    assert cluster.wait(
        lambda found: any(
            row["kind"] == "cluster" and row["workers"]["generated_tokens"] > 0 for row in found["throughput"]["rows"]
        )
    )


def test_a_cordoned_device_returns_after_a_check_under_load(cluster: RunningCluster) -> None:
    cluster.run("cordon", "local:0", "--reason", "a look at it")
    cluster.wait(lambda found: found["models"][0]["ready"] == 0)
    cluster.run("cordon", "local:0", "--undo")
    cluster.wait(lambda found: found["models"][0]["ready"] == 1)
    assert "back in service" in cluster.run("events")


def test_what_the_agent_costs_the_engine_beside_it(
    cluster: RunningCluster, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    beside = max(rate(cluster) for _ in range(3))
    with running(tmp_path_factory.mktemp("alone"), spec(agents=False)) as alone:
        without = max(rate(alone) for _ in range(3))
    with capsys.disabled():
        print(f"\none stream: {beside:.1f} tokens/s with the nccl agent on the device, {without:.1f} without")
    assert beside > 0.5 * without
