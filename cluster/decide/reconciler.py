"""One tick of the control plane as a function: (desired, fleet, observation, now) -> the next fleet and what to do.

Procedure: advance every live replica by what was observed; let each model say what it lacks or has too much
(rollout.py); find places for new replicas in one call (cluster/placement/place.py); list the actions that the states
ask for. Each stage is a function of what was given and of the replicas as the stage before left them, and returns the
replicas that it moves. Actions are level-based: each follows from a state and an observation, is repeated until seen
done, and is idempotent. Nothing here waits, logs, or knows Ray. The controller calls it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from megatoken.backoff import doubling_pause_s
from megatoken.cluster.decide.exit_cause import ExitCause
from megatoken.cluster.decide.fleet import (
    Action,
    Block,
    ClusterEvent,
    Desired,
    Fleet,
    Limits,
    ModelHealth,
    Observation,
    Phase,
    Plan,
    Release,
    Replica,
    ReplicaObservation,
    Reservation,
    Reserve,
    RollBack,
    Start,
    TellDrain,
    WorkerFacts,
    serial_of,
    start_text,
)
from megatoken.cluster.decide.lifecycle import event_for
from megatoken.cluster.decide.replica import FINAL, LIFECYCLE, ReplicaEvent, ReplicaState
from megatoken.cluster.decide.request import request_for
from megatoken.cluster.decide.rollout import RolloutStep, next_step
from megatoken.cluster.placement.place import BlockedKind, Placement, ReplicaRequest, place
from megatoken.cluster.spec.model import ModelSpec

SLUG = str.maketrans({"/": "-", "_": "-", ".": "-"})
NOTHING = ReplicaObservation()
MANY_FAILURES = 3  # starts that failed so often in a row are no longer a passing fault
Replicas = Mapping[str, Replica]


@dataclass(frozen=True, slots=True)
class _Given:
    """What does not change while one tick is decided."""

    desired: Desired
    observation: Observation
    limits: Limits
    now: float
    models: Mapping[str, ModelSpec]

    def seen(self, replica: Replica) -> ReplicaObservation:
        return self.observation.replicas.get(replica.id, NOTHING)


class _Move(NamedTuple):
    """A replica as it is now, and what is told of it."""

    replica: Replica
    event: ClusterEvent


class _Made(NamedTuple):
    """What came of the wish for more replicas."""

    moves: list[_Move]
    blocked: dict[str, Block]


def reconcile(desired: Desired, fleet: Fleet, observation: Observation, limits: Limits, now: float) -> Plan:
    """The next fleet, and the actions that bring the cluster closer to `desired`."""
    given = _Given(desired, observation, limits, now, {model.name: model for model in desired.models})
    replicas: Replicas = {replica.id: replica for replica in fleet.replicas}
    serial = max([fleet.serial, *map(serial_of, _unknown(observation, replicas))])

    observed = _advance(given, replicas)
    health = _health(given, fleet, observed)
    replicas = _after(replicas, observed)
    drained = _honour_drains(given, replicas)
    replicas = _after(replicas, drained)
    steps = _steps(given, replicas, health)
    removed = _remove(given, replicas, steps)
    blocked = _block_starts(given, replicas, health, steps)
    replicas = _after(replicas, removed)
    rollbacks = [RollBack(name, step.roll_back) for name, step in steps.items() if step.roll_back]
    for rollback in rollbacks:  # these failures have had their effect: applied again, the spec is tried anew
        health.pop(rollback.model, None)
    if observation.complete:
        made = _create(given, replicas, steps, serial)
    else:  # who holds which device is not known
        made = _Made([], {name: block for name, block in fleet.blocked.items() if name in given.models})
    replicas = _after(replicas, made.moves)
    blocked |= made.blocked

    following = Fleet(
        _without_old_endings(given, replicas),
        health,
        blocked,
        {name: step.progress for name, step in steps.items() if step.progress},
        max([serial, *(move.replica.serial for move in made.moves)]),
    )
    events = [
        *(move.event for move in (*observed, *drained, *removed)),
        *(_rolled_back(rollback) for rollback in rollbacks),
        *(move.event for move in made.moves),
        *_blocked_events(given, fleet.blocked, blocked),
    ]
    return Plan(following, (*rollbacks, *_actions(given, replicas)), tuple(events))


def _after(replicas: Replicas, moves: Iterable[_Move]) -> Replicas:
    return {**replicas, **{move.replica.id: move.replica for move in moves}}


def _moved(
    given: _Given,
    replica: Replica,
    event: ReplicaEvent,
    reason: str,
    cause: str,
    exit_cause: ExitCause = ExitCause.UNKNOWN,
) -> _Move:
    """A replica one step further along its table."""
    state = LIFECYCLE.next(replica.state, event, replica.history)
    after = replace(
        replica,
        state=state,
        since_s=given.now,
        reason=reason,
        exit_cause=exit_cause,
        history=(*replica.history, event),
    )
    if event is ReplicaEvent.DRAIN:
        deadline_s = given.now + _drain_timeout_s(given, replica)
        after = replace(after, drain_deadline_s=deadline_s, drain_cause=cause)
    elif event is ReplicaEvent.SERVING:
        after = replace(after, facts=_with_place(given.seen(replica).facts, replica.since_s - replica.created_s))
    if exit_cause is ExitCause.NODE_LOST and replica.facts is not None:  # one that never served has no lease
        after = replace(after, serves_until_s=given.seen(replica).lease_until_s)
    why = reason or start_text(after) if event is ReplicaEvent.SERVING else reason
    message = f"{replica.state} -> {state}" + (f": {why}" if why else "")
    fields = {"model": replica.model, "from": replica.state.value, "to": state.value, "why": why}
    return _Move(after, ClusterEvent("replica.state", replica.id, message, cause, fields))


def _with_place(facts: WorkerFacts | None, place_s: float) -> WorkerFacts | None:
    if facts is None or not facts.start_s:
        return facts
    return replace(facts, start_s=(("place", place_s), *facts.start_s))


def _drain_timeout_s(given: _Given, replica: Replica) -> float:
    asked = given.desired.drain_requests.get(replica.id)
    if asked is not None:
        return asked
    model = given.models.get(replica.model)
    return model.drain_timeout_s if model else 30.0


def _advance(given: _Given, replicas: Replicas) -> list[_Move]:
    """Live replicas of which something was observed."""
    moves = []
    for replica in replicas.values():
        if not replica.live:
            continue
        found = event_for(replica, given.models.get(replica.model), given.observation, given.limits, given.now)
        if found is not None:
            event, reason, exit_cause = found
            moves.append(_moved(given, replica, event, reason, "observed", exit_cause))
    return moves


def _health(given: _Given, fleet: Fleet, observed: Sequence[_Move]) -> dict[str, ModelHealth]:
    """How starts went, with the failures and the successes of this tick."""
    health = dict(fleet.health)
    moved = {move.replica.id: move.replica for move in observed}
    for before in fleet.replicas:
        known = health.get(before.model, ModelHealth())
        settled = before.state is ReplicaState.READY and given.now - before.since_s >= given.limits.settled_s
        after = moved.get(before.id)
        if after is None:
            if settled and known.failures and known.revision == before.revision:
                del health[before.model]
        elif after.state is ReplicaState.FAILED and not (settled or _blameless(before, after)):
            health[before.model] = _worse(given, known, before, after.reason)
    return health


def _blameless(before: Replica, after: Replica) -> bool:
    """Whether it failed as it went anyway, or through its node."""
    return before.state is ReplicaState.DRAINING or after.exit_cause is ExitCause.NODE_LOST


def _worse(given: _Given, known: ModelHealth, replica: Replica, reason: str) -> ModelHealth:
    """Starts of the model back off after one more failure."""
    failures = known.failures + 1 if known.revision == replica.revision else 1
    pause_s = doubling_pause_s(failures, given.limits.backoff_s, given.limits.backoff_max_s)
    served = replica.state is ReplicaState.READY
    return ModelHealth(failures, given.now + pause_s, replica.revision, reason, served=served)


def _honour_drains(given: _Given, replicas: Replicas) -> list[_Move]:
    """Replicas that an operator takes away, by themselves or with their node."""
    moves = []
    for replica in replicas.values():
        if not replica.active:
            continue
        if replica.id in given.desired.drain_requests:
            moves.append(_taken_away(given, replica, "drain asked for"))
        elif given.desired.drained_nodes.intersection(replica.placement.nodes):
            moves.append(_taken_away(given, replica, "its node is drained"))
        elif any((rank.node, rank.device) in given.desired.cordons for rank in replica.placement.ranks):
            moves.append(_taken_away(given, replica, "a device of it is cordoned"))
    return moves


def _taken_away(given: _Given, replica: Replica, cause: str) -> _Move:
    if replica.state is ReplicaState.READY:
        return _moved(given, replica, ReplicaEvent.DRAIN, cause, cause)
    return _moved(given, replica, ReplicaEvent.STOP, cause, cause, ExitCause.STOPPED)


def _steps(given: _Given, replicas: Replicas, health: Mapping[str, ModelHealth]) -> dict[str, RolloutStep]:
    """What each model that is wanted does next."""
    if given.desired.stopping:
        return {}
    return {
        name: next_step(
            model,
            [replica for replica in replicas.values() if replica.model == name],
            health.get(name, ModelHealth()),
            can_roll_back=name in given.desired.previous,
            now=given.now,
        )
        for name, model in given.models.items()
    }


def _remove(given: _Given, replicas: Replicas, steps: Mapping[str, RolloutStep]) -> list[_Move]:
    """Replicas of models that are not wanted any more, and those that a model has too many."""
    moves = []
    for replica in replicas.values():
        step = steps.get(replica.model)
        if step is None and replica.active:
            cause = "the cluster goes down" if given.desired.stopping else "its model was removed"
            moves.append(_taken_away(given, replica, cause))
    for name, step in steps.items():
        cause = "replaced by an update" if step.progress else f"{given.models[name].replicas} wanted"
        moves += [_taken_away(given, replicas[replica_id], cause) for replica_id in step.remove]
    return moves


def _block_starts(
    given: _Given, replicas: Replicas, health: Mapping[str, ModelHealth], steps: Mapping[str, RolloutStep]
) -> dict[str, Block]:
    """Models whose next start has to wait, and for what."""
    blocked: dict[str, Block] = {}
    for name, step in steps.items():
        own = health.get(name, ModelHealth())
        if own.revision == given.models[name].revision and given.now < own.not_before_s:
            blocked[name] = Block(BlockedKind.STARTS, _crash_text(own), passes=own.failures < MANY_FAILURES)
        elif step.put_off:
            lost = [r for r in replicas.values() if r.model == name and r.serves_until_s > given.now]
            blocked[name] = Block(BlockedKind.LEASE, _lease_text(lost), passes=True)
    return blocked


def _lease_text(lost: Sequence[Replica]) -> str:
    names = ", ".join(f"{replica.id} ({replica.reason})" for replica in lost)
    return f"{names} may serve until its lease ends; its replacement starts then"


def _crash_text(health: ModelHealth) -> str:
    if health.served:
        what = "a replica died soon after it served"
    else:
        what = "start failed" if health.failures == 1 else f"{health.failures} starts failed in a row"
    return f"{what}: {health.last_failure}"


def _create(given: _Given, replicas: Replicas, steps: Mapping[str, RolloutStep], serial: int) -> _Made:
    """Places for the replicas that models lack."""
    wanted = [name for name, step in steps.items() for _ in range(step.create)]
    requests = [_request(given, name, serial + number) for number, name in enumerate(wanted, start=1)]
    strangers = _unknown(given.observation, replicas)
    if strangers:  # of a fleet whose state file was lost: which devices they hold is not known, and they are ending
        text = f"waits for the end of {', '.join(strangers)}, which nothing is known of"
        return _Made([], {request.model: Block(BlockedKind.CAPACITY, text, passes=True) for request in requests})
    made = _Made([], {})
    yielded = False  # one at a time: its devices may be all that is needed
    held = _held(given, replicas.values())
    for request, outcome in zip(requests, place(requests, given.observation.inventory, held), strict=True):
        if isinstance(outcome, Placement):
            made.moves.append(_planned(given, outcome))
        else:
            passes = _has_room_soon(given, replicas, request)
            made.blocked[outcome.model] = Block(outcome.kind, f"{outcome.reason} {outcome.unblock}".strip(), passes)
            old = replicas.get(steps[outcome.model].yield_one)
            if not yielded and old is not None and old.active and _makes_room(given, replicas, old, request):
                yielded = True
                made.moves.append(_taken_away(given, old, "an update needs its devices"))
    return made


def _request(given: _Given, name: str, serial: int) -> ReplicaRequest:
    replica_id = f"{name.translate(SLUG).lower()}-{serial}"
    return request_for(given.models[name], replica_id, given.desired.device_needs.get(name, 0))


def _planned(given: _Given, placement: Placement) -> _Move:
    model = given.models[placement.model]
    replica = Replica(
        placement.replica, model.name, model.revision, given.desired.generation, placement, given.now, since_s=given.now
    )
    nodes = (given.observation.inventory.node(node_id) for node_id in placement.nodes)
    where = ", ".join(node.title for node in nodes if node is not None)
    fields = {"model": model.name, "nodes": where}
    return _Move(replica, ClusterEvent("replica.planned", replica.id, f"planned on {where}", "reconcile", fields))


def _has_room_soon(given: _Given, replicas: Replicas, request: ReplicaRequest) -> bool:
    """Whether it fits once those that drain or have ended let go of their devices."""
    held = _held(given, replicas.values())
    left = [placement for placement in held if replicas[placement.replica].active]
    return left != held and isinstance(place([request], given.observation.inventory, left)[0], Placement)


def _makes_room(given: _Given, replicas: Replicas, old: Replica, request: ReplicaRequest) -> bool:
    """Whether one more would fit once an old replica is gone, and no devices are about to come free by themselves."""
    held = _held(given, replicas.values())
    if any(not replicas[placement.replica].active for placement in held):
        return False
    without = [placement for placement in held if placement.replica != old.id]
    return isinstance(place([request], given.observation.inventory, without)[0], Placement)


def _held(given: _Given, replicas: Iterable[Replica]) -> list[Placement]:
    """Placements that hold devices: live ones, and ended ones that Ray has not let go of."""
    return [replica.placement for replica in replicas if replica.live or given.seen(replica).holds_something]


def _actions(given: _Given, replicas: Replicas) -> list[Action]:
    """What the states ask for, as far as it is not seen done."""
    known = given.observation.complete  # else what is not seen may well be there, and would be asked for twice
    actions: list[Action] = []
    for replica in replicas.values():
        seen = given.seen(replica)
        if known and replica.state is ReplicaState.RESERVING and seen.reservation is Reservation.NONE:
            actions.append(Reserve(replica))
        elif known and replica.state is ReplicaState.STARTING and seen.phase is Phase.NONE:
            actions.append(Start(replica))
        elif replica.state is ReplicaState.DRAINING:
            if given.now - replica.since_s >= given.limits.drain_grace_s:
                actions.append(TellDrain(replica))
        elif replica.state in FINAL and seen.holds_something:
            actions.append(Release(replica.id))
    return [*actions, *map(Release, _unknown(given.observation, replicas))]


def _unknown(observation: Observation, replicas: Replicas) -> list[str]:
    """Ids that hold something and are of no replica that we remember."""
    seen = observation.replicas.items()
    return [replica_id for replica_id, held in seen if held.holds_something and replica_id not in replicas]


def _rolled_back(rollback: RollBack) -> ClusterEvent:
    return ClusterEvent("model.rollback", rollback.model, f"rolled back: {rollback.reason}", "update failed")


def _blocked_events(given: _Given, before: Mapping[str, Block], blocked: Mapping[str, Block]) -> Iterable[ClusterEvent]:
    """Models that are blocked from now on, and those that are no more."""
    for name, block in blocked.items():
        if name not in before:
            yield ClusterEvent("model.blocked", name, block.text, "reconcile")
    for name in before:
        if name not in blocked and name in given.models:
            yield ClusterEvent("model.unblocked", name, "nothing blocks it any more", "reconcile")


def _without_old_endings(given: _Given, replicas: Replicas) -> tuple[Replica, ...]:
    """Forgets the oldest ended replicas that hold nothing."""
    ended = [r for r in replicas.values() if r.state in FINAL and not given.seen(r).holds_something]
    ended.sort(key=lambda replica: replica.since_s)
    forgotten = {replica.id for replica in ended[: max(0, len(ended) - given.limits.ended_kept)]}
    return tuple(replica for replica in replicas.values() if replica.id not in forgotten)
