"""Lone tries: which replica a suspect gets to itself. Decides no guilt; see recovery for that. Called by placement.

A request is suspect when its replica died before giving it a token: perhaps the request ended it. It is tried once
more, alone, so that whatever comes of it is its own doing: a first token clears it, a second death ends it. So no
request costs a fleet more than two replicas, and one that was merely beside a poison costs none.

A replica becomes a ward for this: it takes no ordinary request, and its first suspect once everybody there has a first
token, which is a prefill away; idle ones go first. Those that have one run on beside the suspect, and so does a suspect
that was cleared: should the replica die, nobody else can be blamed, and they go on elsewhere from their tokens. So a
suspect waits for no answer to end, however long answers are, and hundreds of suspects of one death take a prefill each.
How far those are that other routers and lease holders have there nobody knows, so they should end first; but for other
routers' a suspect waits half of `resume.wait_s` at most, since it would end by itself after the whole, and they go on
elsewhere too. At most half of a model's replicas are wards (one at least); they serve everyone again when no suspect is
left.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from router.fleet import Pool, Replica
from router.state import RouterState

SUSPECTS_A_WARD: Final = 8  # a further ward is opened for so many that wait


def wards(state: RouterState, pool: Pool, now: float) -> Iterator[Replica]:
    """Replicas where a suspect may be tried now, as long as the caller places the next one on each that it gets."""
    usable = [replica for replica in pool.replicas if _usable(replica, now)]
    for replica in pool.replicas:
        if replica.ward and (replica not in usable or not replica.has_room()):
            close(state, replica, now)  # a full one still ends what it has, as any full replica
    kept = [replica for replica in usable if replica.ward]
    first = pool.queue.first_suspect()
    late = first is not None and now - first.placed_s > state.config.resume.wait_s / 2
    most = max(1, min(len(usable) // 2, -(-pool.queue.suspects // SUSPECTS_A_WARD)))
    spare = sorted((r for r in usable if not r.ward and r.has_room()), key=lambda r: (r.leased, r.others, r.in_flight))
    for replica in spare[: max(0, most - len(kept))]:
        replica.ward = True
        state.fleet.refresh(replica, now)
        kept.append(replica)
    for replica in kept:
        company = replica.prompt_outstanding or replica.leased or (replica.others and not late)
        replica.cleared = replica.cleared or not company
        if replica.cleared and replica.trial is None:
            yield replica


def close(state: RouterState, replica: Replica, now: float) -> None:
    """The replica is for everyone again, unless a suspect is being tried there."""
    if replica.ward and replica.trial is None:
        replica.ward = replica.cleared = False
        state.fleet.refresh(replica, now)


def _usable(replica: Replica, now: float) -> bool:
    return (
        replica.connected
        and not replica.gone
        and not replica.draining
        and now >= replica.ejected_until_s
        and replica.circuit.closed
    )
