"""A replica over two hosts whose weights differ: it names the file and the host, and serves nobody.

The model is named by an id; a stand-in of the Hugging Face hub has it, and each host has a cache of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from deploy.netns.hosts import Host, Network
from deploy.netns.ray_nodes import RayNodes
from megatoken.worker.models import TINY_LLAMA, prepare
from tests.support.hub import COMMIT, Hub

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

START_S = 240.0
MODEL = "acme/tiny"
CACHE = "/tmp/hf"
SNAPSHOT = f"{CACHE}/hub/models--acme--tiny/snapshots/{COMMIT}"
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
    process = host.popen(
        command, nodes.environment(host, **nodes.env), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    said, errors = process.communicate(timeout=START_S)
    assert process.returncode
    assert '{"address"' not in said, "it is READY"
    return errors


def test_a_host_whose_weights_differ_is_named_with_the_file_and_nothing_is_served() -> None:
    """The worker's host downloads what it lacks; the other has all of it, and one file is damaged."""
    directory = prepare(TINY_LLAMA, print)
    with Network.create(2) as network, Hub(MODEL, directory, network.machine_address) as hub:
        nodes = RayNodes(network, 2, env={"HF_ENDPOINT": hub.endpoint, "HF_HOME": CACHE})
        nodes.start()
        first, second = network.hosts
        damaged = second.path(SNAPSHOT)
        damaged.mkdir(parents=True)
        data = bytearray((directory / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (damaged / "model.safetensors").write_bytes(data)
        errors = failing_worker(nodes, first, reserve(nodes))
        assert {address for address, name in hub.sent if name == "model.safetensors"} == {first.address}
    (last,) = [line for line in errors.splitlines() if line.startswith("worker: ")]
    assert f"{CACHE}/hub/models--acme--tiny/" in last, errors
    assert "/model.safetensors' is not allowed; replica-1 on node0 has SHA-256 " in last
    assert f" on {second.name}" in last
