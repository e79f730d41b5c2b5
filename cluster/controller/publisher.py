"""The present membership snapshot: what it is made of, its number, and who waits for the next one.

Every number is written to the state file before anybody is told it, so that a controller that dies never gives it to
something else.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from megatoken.cluster.controller.membership import Versions, content_of
from megatoken.cluster.controller.state import StateStore
from megatoken.cluster.decide.backend import ProcessObservation
from megatoken.cluster.decide.fleet import ClusterEvent, Fleet
from megatoken.cluster.inventory.topology import Inventory
from megatoken.cluster.spec.model import ModelSpec
from megatoken.v1 import membership_pb2


@dataclass(frozen=True, slots=True)
class Members:
    """Who there is, as of one look. `complete` is False when Ray did not answer: what it last said stands."""

    fleet: Fleet
    models: Sequence[ModelSpec]
    inventory: Inventory
    processes: Mapping[str, ProcessObservation]
    complete: bool


class Publisher:
    """Lives in the controller's event loop. `tell` writes an event down."""

    def __init__(self, store: StateStore, tell: Callable[[ClusterEvent], None]) -> None:
        # In microseconds, since a controller that loses its file may be started twice within a second.
        epoch = int(store.get("epoch") or time.time_ns() // 1000)
        self.versions = Versions(epoch, int(store.get("version") or 0))
        self._store, self._tell = store, tell
        self._changed = asyncio.Condition()
        self._group: membership_pb2.ThroughputGroup | None = None
        self._members = Members(Fleet(), (), Inventory(), {}, complete=False)

    def publish(self, members: Members) -> None:
        """Takes what is new as the next snapshot. Raises what the state file raises; it is offered again then."""
        self._members = members
        routers = [
            membership_pb2.RouterMember(router=name, address=str(seen.facts["address"]), node=seen.node)
            for name, seen in sorted(members.processes.items())
            if name.startswith("router") and seen.facts and "address" in seen.facts
        ]
        offset_s = time.time() - time.monotonic()
        content = content_of(members.fleet, members.models, members.inventory, routers, self._group, offset_s)
        if not members.complete and self.versions.current.version:
            content.routers.MergeFrom(self.versions.current.routers)
        told = self.versions.known
        if self.versions.offer(content, self._write_version) or not told:
            self._notifying = asyncio.ensure_future(self._notify())

    def set_throughput(self, group: membership_pb2.ThroughputGroup, why: str) -> None:
        """Publishes a new throughput group at once, and first writes its number down: none is used twice."""
        self._store.put(throughput_epoch=str(group.epoch))
        self._group = group
        self._tell(
            ClusterEvent("throughput.epoch", str(group.epoch), f"{len(group.members)} agents: {why}", "attendance")
        )
        self.publish(self._members)

    async def newer_than(self, seen: tuple[int, int]) -> membership_pb2.Snapshot:
        """The present snapshot once its (epoch, version) is not `seen` and it says who serves."""
        async with self._changed:
            while not self.versions.known or (self.versions.current.epoch, self.versions.current.version) == seen:
                await self._changed.wait()
            return self.versions.current

    def _write_version(self, snapshot: membership_pb2.Snapshot) -> None:
        self._store.put(epoch=str(snapshot.epoch), version=str(snapshot.version))

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()
