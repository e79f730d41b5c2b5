"""Lone tries: which replica a suspect gets to itself. Decides no guilt; see recovery for that. Called by placement.

A request is suspect when its replica died before giving it a token: perhaps the request ended it. It is tried once
more, alone, so that whatever comes of it is its own doing: a first token clears it, a second death ends it. So no
request costs a fleet more than two replicas, and one that was merely beside a poison costs none.

A replica becomes a ward for this: it takes no ordinary request, and its first suspect once it is idle. A suspect that
was cleared runs on there, and the next is tried beside it: nobody else is without a first token, so the blame stays
clear, and hundreds of suspects of one death take a prefill each instead of an answer each. At most half of a model's
replicas are wards (one at least); they serve everyone again when no suspect is left.

Where answers are long no ward becomes idle, and a suspect ends after `resume.wait_s`. So it asks for less as it waits:
after a quarter of that a ward will do where everybody has a first token, who then only move if it dies; after half of
it other routers' requests are no obstacle, of whose tokens nobody here knows. Lease holders' always are: they have
nobody who would move them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from megatoken.router.core.state import RouterState
from megatoken.router.fleet.fleet import Endpoint, Pool

_IDLE_SHARE: Final = 0.25  # of its time that a suspect waits for an idle ward
_OTHERS_SHARE: Final = 0.5  # and for other routers' requests to end
SUSPECTS_A_WARD: Final = 8  # a further ward is opened for so many that wait


def wards(state: RouterState, pool: Pool, now: float) -> Iterator[Endpoint]:
    """Replicas where a suspect may be tried now, as long as the caller places the next one on each that it gets."""
    usable = [replica for replica in pool.replicas if _usable(replica, now)]
    for replica in pool.replicas:
        if replica.ward and (replica not in usable or not replica.has_room()):
            close(state, replica, now)  # a full one still ends what it has, as any full replica
    kept = [replica for replica in usable if replica.ward]
    first = pool.queue.first_suspect()
    waited = 0.0 if first is None else (now - first.placed_s) / max(state.config.resume.wait_s, 1e-9)  # share
    most = max(1, min(len(usable) // 2, -(-pool.queue.suspects // SUSPECTS_A_WARD)))
    spare = sorted((r for r in usable if not r.ward and r.has_room()), key=lambda r: (r.leased, r.others, r.in_flight))
    for replica in spare[: max(0, most - len(kept))]:
        replica.ward = True
        state.fleet.refresh(replica, now)
        kept.append(replica)
    for replica in kept:
        replica.cleared = replica.cleared or not _obstacles(replica, waited)
        if replica.cleared and replica.trial is None:
            yield replica


def close(state: RouterState, replica: Endpoint, now: float) -> None:
    """The replica is for everyone again, unless a suspect is being tried there."""
    if replica.ward and replica.trial is None:
        replica.ward = replica.cleared = False
        state.fleet.refresh(replica, now)


def _usable(replica: Endpoint, now: float) -> bool:
    return (
        replica.connected
        and not replica.gone
        and not replica.draining
        and now >= replica.ejected_until_s
        and replica.circuit.closed
    )


def _obstacles(replica: Endpoint, waited: float) -> float:
    """What keeps a suspect off, once it has waited this share of the time that it may; nothing when 0."""
    own = replica.in_flight if waited <= _IDLE_SHARE else replica.prompt_outstanding
    return own + replica.leased + (replica.others if waited <= _OTHERS_SHARE else 0)
