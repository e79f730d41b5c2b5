"""Which replicas are far slower than others of their kind, and are left out for a while. Pure.

Compares the usual time of an engine step, as load reports show it, among replicas of one model and device kind that
have been measured; needs four to tell. A bounded share is left out at once, and the slowest go first.
"""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING

from megatoken.router.config import BreakerConfig

if TYPE_CHECKING:
    from megatoken.router.fleet.fleet import Endpoint, Pool

_MIN_PEERS = 4
_MIN_STEPS = 64


def slow_replicas(pool: Pool, config: BreakerConfig, now: float) -> list[Endpoint]:
    """Replicas to eject now."""
    serving = [r for r in pool.replicas if r.connected and not r.draining and now >= r.ejected_until_s]
    out = sum(now < r.ejected_until_s for r in pool.replicas)
    allowed = int(config.max_ejected * len(pool.replicas)) - out
    if allowed <= 0:
        return []
    kinds: dict[str, list[Endpoint]] = {}
    for replica in serving:
        if replica.steps >= _MIN_STEPS:
            kinds.setdefault(replica.member.device_kind, []).append(replica)
    slow: list[Endpoint] = []
    for peers in kinds.values():
        if len(peers) < _MIN_PEERS:
            continue
        bound = median(r.step_s for r in peers) / config.eject_ratio
        slow += [replica for replica in peers if replica.step_s > bound]
    slow.sort(key=lambda replica: -replica.step_s)
    return slow[:allowed]
