"""Real vLLM over separate hosts: tensor parallel inside a host, pipeline parallel between hosts."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence

import pytest

from deploy.netns import hosts
from deploy.netns.ray_nodes import RayNodes
from megatoken.worker.models import TINY_LLAMA, prepare
from tests.netns.engines import RunningWorker, release, reserve, start_worker

Reserve = Callable[[Sequence[hosts.Host]], str]

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

TINY = "builtin:tiny-llama"
PROMPTS = [[(7 * request + 3 * place) % 4000 + 10 for place in range(20 + 5 * request)] for request in range(3)]
TOKENS = 24


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    if reason := hosts.missing_requirement():
        pytest.skip(reason)
    with hosts.Network.create(2) as network:
        ray_nodes = RayNodes(network, 2)
        ray_nodes.start()
        yield ray_nodes


@pytest.fixture
def group_on(nodes: RayNodes) -> Iterator[Reserve]:
    """Reserves placement groups; gives them back, and checks that no process of an engine is left."""
    made: list[str] = []

    def make(on: Sequence[hosts.Host]) -> str:
        made.append(reserve(nodes, on))
        return made[-1]

    yield make
    for group in made:
        release(nodes, group)
    wait_until_gone(nodes, 10)


def answers(worker: RunningWorker) -> list[list[int]]:
    return [worker.generate(prompt, TOKENS) for prompt in PROMPTS]


def engine_processes(nodes: RayNodes) -> dict[int, str]:
    """Processes of any engine, on every host: the worker, its engine core, and the ranks."""
    words = ("-m megatoken.worker", "EngineCore", "CpuRank", "Worker_")
    return {
        pid: f"{host.name}: {command}"
        for host in nodes.network.hosts
        for pid, command in host.processes().items()
        if any(word in command for word in words)
    }


def wait_until_gone(nodes: RayNodes, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while left := engine_processes(nodes):
        if time.monotonic() > deadline:
            pytest.fail(f"still running after {timeout_s} s: {left}")
        time.sleep(0.1)


def test_tensor_parallel_inside_and_pipeline_between_hosts(nodes: RayNodes, group_on: Reserve) -> None:
    """Rank i runs in bundle i, so the pair of each stage shares a host, and the driver need not be node0."""
    first, second = nodes.network.hosts
    alone = start_worker(nodes, first, None, source=TINY)
    expected = answers(alone)
    assert alone.stop() == 0
    group = group_on([second, second, first, first])
    split = start_worker(nodes, second, group, source=TINY, tensor_parallel=2, pipeline_parallel=2)
    assert [len(nodes.ray_pids(host, "CpuRank")) for host in nodes.network.hosts] == [2, 2]
    began = time.monotonic()
    assert split.generate(PROMPTS[0], 1) == expected[0][:1]
    assert time.monotonic() - began < 10, "the first token waited for something that READY should have covered"
    assert answers(split) == expected
    assert split.stop() == 0


def test_a_host_whose_weights_differ_is_named_with_the_file_and_nothing_is_served(
    nodes: RayNodes, group_on: Reserve
) -> None:
    first, second = nodes.network.hosts
    for host in (first, second):
        shutil.copytree(prepare(TINY_LLAMA, print), host.path("/tmp/model"))
    with host.path("/tmp/model/model.safetensors").open("r+b") as weights:
        weights.seek(-1, 2)
        weights.write(b"!")
    with pytest.raises(RuntimeError) as failed:
        start_worker(nodes, first, group_on([first, second]), source="/tmp/model", pipeline_parallel=2)
    (last,) = [line for line in str(failed.value).splitlines() if line.startswith("worker: ")]
    assert "/tmp/model/model.safetensors" in last, str(failed.value)
    assert f" on {second.name}" in last
