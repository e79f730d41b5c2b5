"""Fixtures for tests on separate hosts: network namespaces, and a Ray node on each."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from deploy.netns import hosts
from deploy.netns.ray_nodes import RayNodes

REASON = hosts.missing_requirement()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/netns" in item.path.as_posix():
            item.add_marker(pytest.mark.netns)
            if REASON:
                item.add_marker(pytest.mark.skip(reason=REASON))


@pytest.fixture
def make_network() -> Iterator[Callable[[int], hosts.Network]]:
    """Makes networks of booted hosts, and takes them down after the test."""
    made: list[hosts.Network] = []

    def make(host_count: int) -> hosts.Network:
        made.append(hosts.Network.create(host_count))
        return made[-1]

    yield make
    for network in made:
        network.destroy()


@pytest.fixture
def make_ray_nodes(make_network: Callable[[int], hosts.Network]) -> Callable[[int, int], RayNodes]:
    """Makes a network with a Ray node of so many cpu_device slots on each host."""

    def make(host_count: int, devices: int) -> RayNodes:
        nodes = RayNodes(make_network(host_count), devices)
        nodes.start()
        return nodes

    return make
