"""The ceiling that present weights put on the fleet, and what holds it back. Pure.

Ceiling: work is shared out as it is now; the replica that has the most work for its speed is full first, and the
fleet can then do no more than sum(capacity) * mean utilisation / highest utilisation.
"""

from __future__ import annotations

from typing import Final

from megatoken.router.fleet.fleet import EndpointTable

_EVEN: Final = 0.9  # above this the shares count as even


def ceiling(fleet: EndpointTable) -> tuple[float, str]:
    """(share of capacity that the present split can reach, what holds back: imbalance, queue, idle, ramp or "")."""
    serving = [r for r in fleet.live() if r.connected and not r.draining and not r.gone]
    if not serving:
        return 0.0, "idle"
    queued = sum(pool.queue.length for pool in fleet.pools.values())
    waits = [max(r.wait_s, 0.0) for r in serving]
    capacity = [r.capacity.decode_tokens_per_s for r in serving]
    highest = max(waits)
    if highest <= 0:
        return 1.0, "idle"
    mean = sum(w * c for w, c in zip(waits, capacity, strict=True)) / sum(capacity)
    share = min(1.0, mean / highest)
    full = sum(not r.has_room() for r in serving)
    if queued and full >= len(serving):
        return share, "queue"
    if any(not r.capacity.measured for r in serving):
        return share, "ramp"
    if share < _EVEN:
        return share, "imbalance"
    if sum(r.in_flight for r in serving) < 0.5 * sum(r.capacity.batch for r in serving):
        return share, "idle"
    return share, ""
