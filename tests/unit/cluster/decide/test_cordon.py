"""Cordoned devices are out, on the machine whatever Ray calls it, and `status` says why."""

from megatoken.cluster.decide.cordon import Cordon, with_cordons
from megatoken.cluster.decide.fleet import Desired
from megatoken.cluster.inventory.topology import Device, Inventory, Node
from megatoken.process.host import HOST_LABEL

CPU = tuple(Device("cpu", index) for index in range(2))
NODES = Inventory(
    (
        Node("old", "10.0.0.1", CPU, labels={HOST_LABEL: "h"}, alive=False),
        Node("new", "10.0.0.1", CPU, labels={HOST_LABEL: "h"}),
        Node("plain", "10.0.0.2", CPU),
    )
)


def test_a_device_is_out_on_its_machine_and_on_no_other() -> None:
    marked = with_cordons(NODES, {("h", 1): Cordon("its fan is loud"), ("plain", 0): Cordon()})
    out = {(node.id, device.index): device.out for node, device in marked.devices() if device.out}
    assert out == {
        ("old", 1): "cordoned: its fan is loud",
        ("new", 1): "cordoned: its fan is loud",
        ("plain", 0): "cordoned",
    }
    assert with_cordons(NODES, {}) == NODES


def test_one_that_returns_says_that_it_is_checked_first() -> None:
    assert str(Cordon("hot", returning=True)) == "cordoned: hot; it returns once a check of it passes"


def test_orders_are_kept_by_machine_and_read_by_rays_id_of_it() -> None:
    cordon = Cordon("hot")
    desired = Desired(drained_nodes=frozenset({"plain"}), cordons={("h", 1): cordon, ("gone", 0): cordon})
    read = desired.on_nodes(NODES)
    assert read.drained_nodes == {"plain"}
    assert read.cordons == {("old", 1): cordon, ("new", 1): cordon}
