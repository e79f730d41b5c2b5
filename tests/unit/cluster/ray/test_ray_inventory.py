"""Ray's list of nodes as an inventory."""

from typing import Any

import pytest

from megatoken.cluster.ray.inventory import inventory_of


def node(**changes: Any) -> dict[str, Any]:
    entry = {
        "NodeID": "f" * 56,
        "Alive": True,
        "NodeManagerAddress": "10.0.0.1",
        "NodeName": "10.0.0.1",
        "Resources": {"cpu_device": 2.0, "node:__internal_head__": 1.0},
        "Labels": {"site": "oslo", "rack": "r1", "node": "alpha", "ray.io/node-id": "f" * 56},
    }
    return {**entry, **changes}


def test_a_cpu_node() -> None:
    (found,) = inventory_of([node()]).nodes
    assert (found.title, found.address, found.site, found.rack, found.head) == ("alpha", "10.0.0.1", "oslo", "r1", True)
    assert [(device.kind, device.index) for device in found.devices] == [("cpu", 0), ("cpu", 1)]
    assert "ray.io/node-id" not in found.labels


@pytest.mark.parametrize(
    ("resource", "kind"),
    [
        ("accelerator_type:AMD-Instinct-MI355X-OAM", "mi355x-oam"),
        ("accelerator_type:H200", "h200"),
        ("accelerator_type:NVIDIA-H100", "h100"),
        ("memory", "gpu"),
    ],
)
def test_gpu_kinds_have_no_vendor(resource: str, kind: str) -> None:
    labels = {"link_domains": "2,2", "device_memory_gib": "288"}
    (found,) = inventory_of([node(Resources={"GPU": 4.0, "cpu_device": 8.0, resource: 1.0}, Labels=labels)]).nodes
    assert [device.kind for device in found.devices] == [kind] * 4  # a GPU node's CPU slots are no devices
    assert [device.link_domain for device in found.devices] == ["0", "0", "1", "1"]
    assert found.devices[0].memory_bytes == 288 << 30


@pytest.mark.parametrize("sizes", ["", "3", "9,9", "x", "-1,3"])
def test_domains_that_do_not_add_up_are_none(sizes: str) -> None:
    (found,) = inventory_of([node(Labels={"link_domains": sizes, "device_memory_gib": "much"})]).nodes
    assert {device.link_domain for device in found.devices} == {""}
    assert found.devices[0].memory_bytes == 0


def test_a_node_with_nothing_of_ours_and_a_dead_one() -> None:
    bare, dead = inventory_of([node(Resources={}, Labels={}), node(NodeID="e" * 56, Alive=False)]).nodes
    assert bare.devices == ()
    assert bare.title == "10.0.0.1"
    assert not dead.alive


def test_draining_nodes_and_devices_that_are_out() -> None:
    (found,) = inventory_of([node()], draining=frozenset({"f" * 56}), out={("f" * 56, 1): "rank died twice"}).nodes
    assert found.draining
    assert [device.out for device in found.devices] == ["", "rank died twice"]
