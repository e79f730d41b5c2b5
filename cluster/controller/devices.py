"""Which devices serve: those on which replicas keep dying stay out, and cordoned ones, until a check lets them back."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from megatoken.cluster.controller.desired_state import DesiredState
from megatoken.cluster.decide.cordon import with_cordons
from megatoken.cluster.decide.device_health import (
    DeviceStrikes,
    DriverState,
    Place,
    checked,
    due,
    judge,
    reported,
    with_devices_out,
)
from megatoken.cluster.decide.fleet import Fleet
from megatoken.cluster.inventory.topology import Inventory


class Devices:
    """Lives in the controller's event loop; `clock` is monotonic, in seconds."""

    def __init__(self, desired_state: DesiredState, clock: Callable[[], float] = time.monotonic) -> None:
        self._desired_state, self._clock = desired_state, clock
        self._strikes = DeviceStrikes()

    def marked(self, inventory: Inventory) -> Inventory:
        """With those that are out, and why."""
        struck = with_devices_out(inventory, self._strikes, self._clock())
        return with_cordons(struck, self._desired_state.desired.cordons)

    def judge(self, before: Fleet, after: Fleet) -> None:
        """Learns from what a tick made of the fleet."""
        self._strikes = judge(self._strikes, before, after, self._clock())

    def hear(self, states: Mapping[Place, DriverState]) -> None:
        """What drivers said of their devices."""
        self._strikes = reported(self._strikes, states, self._clock())

    def take(self, checks: Mapping[Place, str], inventory: Inventory) -> None:
        """Checks ended, with what each found; empty: nothing."""
        for place, problem in checks.items():
            self._strikes = checked(self._strikes, place, problem, self._clock())
            node = inventory.node(place[0])
            if node is not None:
                self._desired_state.end_check(node, place[1], problem)

    def to_check(self, inventory: Inventory, fleet: Fleet) -> list[Place]:
        """Those that are to come back, on living nodes, once nothing of ours runs on them."""
        cordons = self._desired_state.desired.on_nodes(inventory).cordons
        wanted = due(self._strikes, self._clock()) | {place for place, cordon in cordons.items() if cordon.returning}
        if not wanted:
            return []
        alive = {node.id for node in inventory.nodes if node.alive}
        live = (replica for replica in fleet.replicas if replica.live)
        held = {(rank.node, rank.device) for replica in live for rank in replica.placement.ranks}
        return sorted(place for place in wanted - held if place[0] in alive)
