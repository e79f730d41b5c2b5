"""Devices that an operator takes out of service, and how they come back: after a check that loads them. Pure.

Kept by the machine (`Node.host`) and not by Ray's id of the node, so that a cordon outlives its Ray.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from megatoken.cluster.inventory.topology import Inventory

HostDevice = tuple[str, int]
"""(Node.host, device index)"""


@dataclass(frozen=True, slots=True)
class Cordon:
    """Why a device is out. `returning`: the operator wants it back, and it is being checked."""

    reason: str = ""
    returning: bool = False

    def __str__(self) -> str:
        """For `status`."""
        said = f"cordoned: {self.reason}" if self.reason else "cordoned"
        return f"{said}; it returns once a check of it passes" if self.returning else said


def with_cordons(inventory: Inventory, cordons: Mapping[HostDevice, Cordon]) -> Inventory:
    """The inventory with the cordoned devices marked, and why."""
    if not cordons:
        return inventory
    return Inventory(
        tuple(
            replace(
                node,
                devices=tuple(
                    replace(device, out=str(cordons[node.host, device.index]))
                    if (node.host, device.index) in cordons
                    else device
                    for device in node.devices
                ),
            )
            for node in inventory.nodes
        )
    )
