"""Decides, for one model, how many replicas to make and which to take away. Pure; the reconciler calls it every tick.

Procedure. Replicas of the wanted revision are `current`, others `old`; those that drain count as neither.
1. No old ones: make what is missing; take away what is too much, first what does not serve yet, then the youngest.
2. Old ones: make current ones, at most `surge` above the wanted number; for every current one that is READY take one
   old one away, so that never fewer serve than are wanted. Old ones that do not serve yet go first and at once.
3. A new revision that fails `attempts` starts in a row is rolled back, also where the old ones had to go first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatoken.cluster.decide.fleet import ModelHealth, Replica
from megatoken.cluster.decide.replica import ReplicaState
from megatoken.cluster.spec.model import ModelSpec


@dataclass(frozen=True, slots=True)
class RolloutStep:
    """What one model needs now."""

    create: int = 0
    put_off: int = 0
    """Replicas that are made later: those that they replace are out of reach, and may serve until their leases end."""
    remove: tuple[str, ...] = ()
    """Replica ids that end: READY ones drain, others stop."""
    roll_back: str = ""
    """Why the update is given up; empty: it is not."""
    progress: str = ""
    """Of an update, for people; empty: none runs."""
    yield_one: str = ""
    """An old replica that may go first if the new one has no room beside it; empty: none may."""


def next_step(
    model: ModelSpec, replicas: Sequence[Replica], health: ModelHealth, *, can_roll_back: bool, now: float
) -> RolloutStep:
    """The step that brings `replicas` (all of this model) closer to `model`."""
    active = [replica for replica in replicas if replica.active]
    current = [replica for replica in active if replica.revision == model.revision]
    old = [replica for replica in active if replica.revision != model.revision]
    waits = now < health.not_before_s and health.revision == model.revision
    leaving = sum(1 for replica in replicas if not replica.live and replica.serves_until_s > now)
    failing = health.revision == model.revision and health.failures >= model.update.attempts
    works = any(replica.state is ReplicaState.READY for replica in current)
    if can_roll_back and failing and (old or not works):
        return RolloutStep(roll_back=f"{health.failures} starts failed in a row: {health.last_failure}")
    if not old:
        return _after(leaving, _settle(model.replicas, current, waits=waits))
    return _after(leaving, _exchange(model, current, old, replicas, waits=waits))


def _after(leaving: int, step: RolloutStep) -> RolloutStep:
    """The step, with the makings put off that would stand beside replicas whose leases still run."""
    held = min(leaving, step.create)
    return replace(step, create=step.create - held, put_off=held)


def _settle(wanted: int, current: Sequence[Replica], *, waits: bool) -> RolloutStep:
    missing = wanted - len(current)
    if missing >= 0:
        return RolloutStep(create=0 if waits else missing)
    by_worth = sorted(current, key=_worth)
    return RolloutStep(remove=tuple(replica.id for replica in by_worth[:-missing]))


def _exchange(
    model: ModelSpec, current: Sequence[Replica], old: Sequence[Replica], replicas: Sequence[Replica], *, waits: bool
) -> RolloutStep:
    wanted = model.replicas
    ready = [replica for replica in current if replica.state is ReplicaState.READY]
    progress = f"{len(ready)} of {wanted} updated"
    if len(current) > wanted:
        return RolloutStep(remove=tuple(replica.id for replica in sorted(current, key=_worth)[: len(current) - wanted]))
    idle = [replica.id for replica in old if replica.state is not ReplicaState.READY]
    serving_old = sorted((replica for replica in old if replica.state is ReplicaState.READY), key=lambda r: r.created_s)
    spare = max(0, len(ready) + len(serving_old) - wanted)
    remove = (*idle, *(replica.id for replica in serving_old[:spare]))
    kept = len(old) - len(remove)
    room = max(0, wanted + model.update.surge - len(current) - kept)
    create = 0 if waits else min(wanted - len(current), room)
    draining = any(replica.state is ReplicaState.DRAINING for replica in replicas)
    starting = len(current) > len(ready)
    first_out = serving_old[spare:][:1] if not (draining or starting or remove) else []
    if create == 0 and not starting and not waits and first_out and model.update.surge == 0:
        return RolloutStep(remove=(first_out[0].id,), progress=progress)
    return RolloutStep(create=create, remove=remove, progress=progress, yield_one=first_out[0].id if first_out else "")


def _worth(replica: Replica) -> tuple[bool, float, int]:
    """Least worth first: not serving, then youngest."""
    return (replica.state is ReplicaState.READY, -replica.created_s, -replica.serial)
