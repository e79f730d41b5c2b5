"""What the controller reads and renews beside its loop: workers' leases and loads, routers' queues, agents' samples.

Two loops of their own, since a router that does not answer must not cost a worker its lease. Readings are for people;
leases and what comes with them are what the reconciler learns of hangs from.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from megatoken.cluster.controller.links import Links
from megatoken.cluster.decide.fleet import Replica
from megatoken.cluster.decide.liveness import LivenessLimits

POLL_S = 1.0  # between readings of queues and throughput
RENEW_S = 1.0  # between renewals of workers' leases, which bring their loads


@dataclass(frozen=True, slots=True)
class Readable:
    """Whom to ask, as of the last look: routers and agents by name, with the address that each has for us."""

    replicas: Sequence[Replica]
    routers: Mapping[str, str]
    agents: Mapping[str, str]
    limits: LivenessLimits


class Polls:
    """Lives in the controller's event loop. `survived` is told what failed and goes on, where it is caught."""

    def __init__(self, links: Links, readable: Callable[[], Readable], survived: Callable[[str], None]) -> None:
        self._links, self._readable, self._survived = links, readable, survived

    async def renew_forever(self) -> None:
        """Until cancelled."""
        while True:
            try:
                now = self._readable()
                self._links.renew(now.replicas, now.limits)
            except Exception:
                self._survived("renewal of leases")
            await asyncio.sleep(RENEW_S)

    async def read_forever(self) -> None:
        """Until cancelled."""
        while True:
            try:
                await self._read(self._readable())
            except Exception:  # the next round reads again
                self._survived("reading of loads")
            await asyncio.sleep(POLL_S)

    async def _read(self, now: Readable) -> None:
        await self._links.read_routers(now.routers)
        await self._links.read_throughput(now.agents.values())
        workers = {replica.facts.address for replica in now.replicas if replica.facts and replica.live}
        await self._links.keep_only({*workers, *now.routers.values(), *now.agents.values()})
