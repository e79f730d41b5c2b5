"""The spec of two nodes that the documentation shows, as its README says: one replica of SmolLM2 across both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from deploy.netns import hosts
from deploy.netns.ray_nodes import RayNodes
from tests.netns.host_clusters import HostCluster

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

START_S = 300.0


def test_it_starts_and_answers(make_ray_nodes: Callable[[int, int], RayNodes]) -> None:
    nodes = make_ray_nodes(2, 1)
    cluster = HostCluster(nodes, {})
    cluster.up(str(Path(hosts.__file__).with_name("two-nodes.yaml")))
    with cluster.control:
        (replica,) = cluster.wait_ready("smollm2-135m-instruct", 1, START_S)
        assert len({line.split()[2] for line in replica.ranks}) == 2, replica.ranks
        said = cluster.command("generate", "What is the capital of Japan?", timeout_s=120)
        assert "Tokyo" in said
        cluster.down()
