"""Which devices serve: those on which replicas keep dying stay out, and cordoned ones, until a check lets them back."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from megatoken.cluster.controller.desired_state import DesiredState
from megatoken.cluster.decide.cordon import with_cordons
from megatoken.cluster.decide.device_check import DeviceCheck, check_of
from megatoken.cluster.decide.device_health import (
    DeviceStrikes,
    DriverState,
    Place,
    Strikes,
    checked,
    due,
    judge,
    reported,
    with_devices_out,
)
from megatoken.cluster.decide.fleet import ClusterEvent, Fleet
from megatoken.cluster.inventory.topology import Inventory


class Devices:
    """Lives in the controller's event loop; `clock` is monotonic, in seconds. `tell` has what goes out and returns."""

    def __init__(
        self,
        desired_state: DesiredState,
        tell: Callable[[ClusterEvent], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._desired_state, self._tell, self._clock = desired_state, tell, clock
        self._strikes = DeviceStrikes()
        self._inventory = Inventory()

    def marked(self, inventory: Inventory) -> Inventory:
        """With those that are out, and why."""
        self._inventory = inventory
        struck = with_devices_out(inventory, self._strikes, self._clock())
        return with_cordons(struck, self._desired_state.desired.cordons)

    def judge(self, before: Fleet, after: Fleet) -> None:
        """Learns from what a tick made of the fleet."""
        self._note(judge(self._strikes, before, after, self._pause_s, self._clock()))

    def hear(self, states: Mapping[Place, DriverState]) -> None:
        """What drivers said of their devices."""
        self._note(reported(self._strikes, states, self._pause_s, self._clock()))

    def take(self, checks: Mapping[Place, str], inventory: Inventory) -> None:
        """Checks ended, with what each found; empty: nothing."""
        for place, problem in checks.items():
            self._note(checked(self._strikes, place, problem, self._pause_s, self._clock()))
            node = inventory.node(place[0])
            if node is not None:
                self._desired_state.end_check(node, place[1], problem)

    def to_check(self, inventory: Inventory, fleet: Fleet) -> list[DeviceCheck]:
        """Those that are to come back, on living nodes, once nothing of ours runs on them."""
        cordons = self._desired_state.desired.on_nodes(inventory).cordons
        wanted = due(self._strikes, self._clock()) | {place for place, cordon in cordons.items() if cordon.returning}
        if not wanted:
            return []
        live = (replica for replica in fleet.replicas if replica.live)
        held = {(rank.node, rank.device) for replica in live for rank in replica.placement.ranks}
        checks = (check_of(place, inventory, held) for place in sorted(wanted - held))
        return [check for check in checks if check is not None]

    @property
    def _pause_s(self) -> float:
        return self._desired_state.spec.control.device_pause_s

    def _note(self, after: DeviceStrikes) -> None:
        """Takes what is now held against devices, and tells what goes out or returns by it."""
        for place in sorted({*self._strikes.strikes, *after.strikes}):
            was, now = (book.strikes.get(place, Strikes()) for book in (self._strikes, after))
            if now.out and (not was.out or now.reason != was.reason):
                self._say("device.out", place, now.reason)
            elif was.out and not now.out:
                self._say("device.returned", place, "back in service")
        self._strikes = after

    def _say(self, kind: str, place: Place, message: str) -> None:
        node = self._inventory.node(place[0])
        self._tell(ClusterEvent(kind, f"{node.title if node else place[0]}:{place[1]}", message, "device"))
