"""A replica over two hosts whose weights differ: it names the file and the host, and serves nobody."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable

import pytest

from deploy.netns.hosts import Host
from deploy.netns.ray_nodes import RayNodes
from megatoken.worker.models import TINY_LLAMA, prepare

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

START_S = 240.0
MODEL = "/tmp/model"
RESERVE = """
import json, sys, ray
from ray.util.placement_group import placement_group
ray.init(logging_level="ERROR")
bundles = [{"cpu_device": 1, f"node:{address}": 0.001} for address in json.loads(sys.argv[1])]
group = placement_group(bundles, strategy="PACK", lifetime="detached")
ray.get(group.ready(), timeout=30)
print(group.id.hex())
"""


def reserve(nodes: RayNodes) -> str:
    """A detached placement group with a bundle on each host; its id. It goes with the hosts."""
    addresses = json.dumps([host.address for host in nodes.network.hosts])
    done = nodes.head.run([sys.executable, "-c", RESERVE, addresses], nodes.environment(nodes.head))
    return done.stdout.split()[-1]


def failing_worker(nodes: RayNodes, host: Host, group: str) -> str:
    """Starts a worker of two stages on a host, as the control plane does; what it said when it ended."""
    config = {
        "replica": "replica-1",
        "model": "model",
        "source": MODEL,
        "host": host.address,
        "unguarded": True,  # no control plane stands behind it
        "counters_dir": "/tmp/counters",
        "node": host.name,
        "dtype": "float32",
        "max_model_len": 512,
        "max_running": 8,
        "kv_cache_gib": 0.25,
        "cpu_threads": 1,
        "log_level": "warning",
        "pipeline_parallel": 2,
        "ray_address": nodes.address,
        "placement_group_id": group,
        "rank_devices": [0, 0],
    }
    host.path("/tmp/worker.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "megatoken.worker", "--config", "/tmp/worker.json"]
    process = host.popen(command, nodes.environment(host), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    said, errors = process.communicate(timeout=START_S)
    assert process.returncode
    assert '{"address"' not in said, "it is READY"
    return errors


def test_a_host_whose_weights_differ_is_named_with_the_file_and_nothing_is_served(
    make_ray_nodes: Callable[[int, int], RayNodes],
) -> None:
    nodes = make_ray_nodes(2, 2)
    first, second = nodes.network.hosts
    for host in (first, second):
        shutil.copytree(prepare(TINY_LLAMA, print), host.path(MODEL))
    with second.path(f"{MODEL}/model.safetensors").open("r+b") as weights:
        weights.seek(-1, 2)
        weights.write(b"!")
    errors = failing_worker(nodes, first, reserve(nodes))
    (last,) = [line for line in errors.splitlines() if line.startswith("worker: ")]
    assert f"{MODEL}/model.safetensors" in last, errors
    assert f" on {second.name}" in last
