"""Asks the drivers of every node with accelerators, about once a minute, without waiting for any."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from megatoken.cluster.decide.device_health import DriverState, Place
from megatoken.cluster.inventory.topology import CPU_KIND, Inventory
from megatoken.cluster.ray.device_tasks import driver_states

EVERY_S = 60.0


class DriverPoll:
    """`clock` is monotonic, in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._asked: dict[str, Any] = {}
        self._last_s: dict[str, float] = {}

    def state(self, inventory: Inventory) -> dict[Place, DriverState]:
        """What came since the last call."""
        nodes = {reference: node for node, reference in self._asked.items()}
        ended, _ = ray.wait(list(nodes), num_returns=len(nodes), timeout=0) if nodes else ((), ())
        found = {}
        for reference in ended:
            node = nodes[reference]
            del self._asked[node]
            try:
                told = ray.get(reference)
            except RayError:  # the node is gone, or was never well: its devices are as they were
                continue
            found.update({(node, device): DriverState(errors, broken) for device, (errors, broken) in told.items()})
        self._ask(inventory)
        return found

    def _ask(self, inventory: Inventory) -> None:
        now = self._clock()
        for node in inventory.nodes:
            devices = [device.index for device in node.devices if device.kind != CPU_KIND]
            if not node.alive or not devices or node.id in self._asked:
                continue
            if now - self._last_s.get(node.id, now - EVERY_S) < EVERY_S:
                continue
            self._last_s[node.id] = now
            strategy = NodeAffinitySchedulingStrategy(node.id, soft=False)
            self._asked[node.id] = driver_states.options(scheduling_strategy=strategy).remote(devices)
