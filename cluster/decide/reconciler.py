"""One tick of the control plane as a function: (desired, fleet, observation, now) -> the next fleet and what to do.

Procedure: advance every live replica by what was observed; let each model say what it lacks or has too much
(rollout.py); find places for new replicas in one call (cluster/placement/place.py); list the actions that the states
ask for. Actions are level-based: each follows from a state and an observation, is repeated until seen done, and is
idempotent. Nothing here waits, logs, or knows Ray. The controller calls it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from megatoken.backoff import doubling_pause_s
from megatoken.cluster.decide.exit_cause import ExitCause
from megatoken.cluster.decide.fleet import (
    Action,
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
    serial_of,
)
from megatoken.cluster.decide.lifecycle import event_for
from megatoken.cluster.decide.replica import FINAL, LIFECYCLE, ReplicaEvent, ReplicaState
from megatoken.cluster.decide.request import request_for
from megatoken.cluster.decide.rollout import RolloutStep, next_step
from megatoken.cluster.placement.place import Blocked, BlockedKind, Placement, ReplicaRequest, place
from megatoken.cluster.spec.model import ModelSpec

SLUG = str.maketrans({"/": "-", "_": "-", ".": "-"})


@dataclass
class _Tick:
    """The fleet while one tick works on it."""

    desired: Desired
    observation: Observation
    limits: Limits
    now: float
    replicas: dict[str, Replica]
    health: dict[str, ModelHealth]
    serial: int
    models: dict[str, ModelSpec]
    blocked: dict[str, str] = field(default_factory=dict)
    blocked_kinds: dict[str, BlockedKind] = field(default_factory=dict)
    rollouts: dict[str, str] = field(default_factory=dict)
    actions: list[Action] = field(default_factory=list)
    events: list[ClusterEvent] = field(default_factory=list)

    def block(self, model: str, kind: BlockedKind, text: str) -> None:
        self.blocked[model], self.blocked_kinds[model] = text, kind

    def send(
        self,
        replica: Replica,
        event: ReplicaEvent,
        reason: str,
        cause: str,
        exit_cause: ExitCause = ExitCause.UNKNOWN,
    ) -> None:
        """Moves a replica along its table and writes down that it did."""
        state = LIFECYCLE.next(replica.state, event, replica.history)
        changes: dict[str, object] = {"state": state, "since_s": self.now, "reason": reason, "exit_cause": exit_cause}
        changes["history"] = (*replica.history, event)
        if event is ReplicaEvent.DRAIN:
            changes["drain_deadline_s"] = self.now + self._drain_timeout_s(replica)
            changes["drain_cause"] = cause
        if exit_cause is ExitCause.NODE_LOST:
            changes["serves_until_s"] = self._lease_until_s(replica)
        if event is ReplicaEvent.SERVING:
            changes["facts"] = self.observation.replicas[replica.id].facts
        self.replicas[replica.id] = replace(replica, **changes)  # type: ignore[arg-type]
        message = f"{replica.state} -> {state}" + (f": {reason}" if reason else "")
        fields = {"model": replica.model, "from": replica.state.value, "to": state.value}
        self.events.append(ClusterEvent("replica.state", replica.id, message, cause, fields))

    def _lease_until_s(self, replica: Replica) -> float:
        """Until when a replica that cannot be reached may serve; one that never served has no lease."""
        seen = self.observation.replicas.get(replica.id, ReplicaObservation())
        return seen.lease_until_s if replica.facts is not None else 0.0

    def _drain_timeout_s(self, replica: Replica) -> float:
        asked = self.desired.drain_requests.get(replica.id)
        if asked is not None:
            return asked
        model = self.models.get(replica.model)
        return model.drain_timeout_s if model else 30.0


def reconcile(desired: Desired, fleet: Fleet, observation: Observation, limits: Limits, now: float) -> Plan:
    """The next fleet, and the actions that bring the cluster closer to `desired`."""
    models = {model.name: model for model in desired.models}
    replicas = {replica.id: replica for replica in fleet.replicas}
    serial = max([fleet.serial, *(serial_of(replica_id) for replica_id in _unknown(observation, replicas))])
    tick = _Tick(desired, observation, limits, now, replicas, dict(fleet.health), serial, models)
    _advance(tick)
    _honour_drains(tick)
    steps = _decide(tick)
    if observation.complete:  # else who holds which device is not known
        _create(tick, steps)
    else:
        for name, text in fleet.blocked.items():
            if name in models:
                tick.block(name, fleet.blocked_kinds[name], text)
    _list_actions(tick)
    _tell_blocked(tick, fleet)
    kept = _without_old_endings(tick)
    following = Fleet(kept, tick.health, tick.blocked, tick.blocked_kinds, tick.rollouts, tick.serial)
    return Plan(following, tuple(tick.actions), tuple(tick.events))


def _advance(tick: _Tick) -> None:
    for replica in list(tick.replicas.values()):
        if not replica.live:
            continue
        found = event_for(replica, tick.models.get(replica.model), tick.observation, tick.limits, tick.now)
        if found is not None:
            event, reason, exit_cause = found
            tick.send(replica, event, reason, "observed", exit_cause)
            if event is ReplicaEvent.FAIL:
                _count_failure(tick, replica, reason, exit_cause)
        elif replica.state is ReplicaState.READY and tick.now - replica.since_s >= tick.limits.settled_s:
            health = tick.health.get(replica.model)
            if health is not None and health.failures and health.revision == replica.revision:
                tick.health.pop(replica.model)


def _count_failure(tick: _Tick, replica: Replica, reason: str, exit_cause: ExitCause) -> None:
    """Backs the model's starts off, unless the node is to blame or the replica had served for long."""
    served_long = replica.state is ReplicaState.READY and tick.now - replica.since_s >= tick.limits.settled_s
    if exit_cause is ExitCause.NODE_LOST or served_long or replica.state is ReplicaState.DRAINING:
        return
    before = tick.health.get(replica.model, ModelHealth())
    failures = before.failures + 1 if before.revision == replica.revision else 1
    pause_s = doubling_pause_s(failures, tick.limits.backoff_s, tick.limits.backoff_max_s)
    tick.health[replica.model] = ModelHealth(
        failures, tick.now + pause_s, replica.revision, reason, served=replica.state is ReplicaState.READY
    )


def _honour_drains(tick: _Tick) -> None:
    for replica in list(tick.replicas.values()):
        if not replica.active:
            continue
        node = next((n for n in replica.placement.nodes if n in tick.desired.drained_nodes), None)
        if replica.id in tick.desired.drain_requests:
            _take_away(tick, replica, "drain asked for")
        elif node is not None:
            _take_away(tick, replica, "its node is drained")


def _take_away(tick: _Tick, replica: Replica, cause: str) -> None:
    if replica.state is ReplicaState.READY:
        tick.send(replica, ReplicaEvent.DRAIN, cause, cause)
    else:
        tick.send(replica, ReplicaEvent.STOP, cause, cause, ExitCause.STOPPED)


def _decide(tick: _Tick) -> dict[str, RolloutStep]:
    by_model: dict[str, list[Replica]] = {name: [] for name in tick.models}
    for replica in tick.replicas.values():
        by_model.setdefault(replica.model, []).append(replica)
    steps: dict[str, RolloutStep] = {}
    for name, replicas in by_model.items():
        model = tick.models.get(name)
        if model is None or tick.desired.stopping:
            cause = "the cluster goes down" if tick.desired.stopping else "its model was removed"
            for replica in replicas:
                if replica.active:
                    _take_away(tick, replica, cause)
            continue
        health = tick.health.get(name, ModelHealth())
        step = next_step(model, replicas, health, can_roll_back=name in tick.desired.previous, now=tick.now)
        cause = "replaced by an update" if step.progress else f"{model.replicas} wanted"
        for replica_id in step.remove:
            _take_away(tick, tick.replicas[replica_id], cause)
        if step.progress:
            tick.rollouts[name] = step.progress
        if step.roll_back:
            tick.actions.append(RollBack(name, step.roll_back))
            tick.health.pop(name, None)  # these failures have had their effect: applied again, the spec is tried anew
            tick.events.append(ClusterEvent("model.rollback", name, f"rolled back: {step.roll_back}", "update failed"))
        if step.put_off:
            tick.block(name, BlockedKind.LEASE, _lease_text(replicas, tick.now))
        if _has_failed_start(health, model, tick.now):
            tick.block(name, BlockedKind.STARTS, _crash_text(health))
        steps[name] = step
    return steps


def _has_failed_start(health: ModelHealth, model: ModelSpec, now: float) -> bool:
    return health.revision == model.revision and now < health.not_before_s


def _lease_text(replicas: Sequence[Replica], now: float) -> str:
    lost = [f"{replica.id} ({replica.reason})" for replica in replicas if replica.serves_until_s > now]
    return f"{', '.join(lost)} may serve until its lease ends; its replacement starts then"


def _crash_text(health: ModelHealth) -> str:
    if health.served:
        what = "a replica died soon after it served"
    else:
        what = "start failed" if health.failures == 1 else f"{health.failures} starts failed in a row"
    return f"{what}: {health.last_failure}"


def _create(tick: _Tick, steps: Mapping[str, RolloutStep]) -> None:
    requests: list[ReplicaRequest] = []
    for name, step in steps.items():
        for _ in range(step.create):
            serial = tick.serial + len(requests) + 1
            need = tick.desired.device_needs.get(name, 0)
            requests.append(request_for(tick.models[name], f"{name.translate(SLUG).lower()}-{serial}", need))
    if not requests:
        return
    strangers = _unknown(tick.observation, tick.replicas)
    if strangers:  # of a fleet whose state file was lost: which devices they hold is not known, and they are ending
        for request in requests:
            text = f"waits for the end of {', '.join(strangers)}, which nothing is known of"
            tick.block(request.model, BlockedKind.CAPACITY, text)
        return
    existing = _held(tick)
    for outcome in place(requests, tick.observation.inventory, existing):
        if isinstance(outcome, Placement):
            _add(tick, outcome)
        else:
            _block(tick, outcome, steps[outcome.model], existing, requests)


def _add(tick: _Tick, placement: Placement) -> None:
    model = tick.models[placement.model]
    replica = Replica(
        placement.replica, model.name, model.revision, tick.desired.generation, placement, tick.now, since_s=tick.now
    )
    tick.replicas[replica.id] = replica
    tick.serial = max(tick.serial, replica.serial)
    nodes = (tick.observation.inventory.node(node_id) for node_id in placement.nodes)
    where = ", ".join(node.title for node in nodes if node is not None)
    fields = {"model": model.name, "nodes": where}
    tick.events.append(ClusterEvent("replica.planned", replica.id, f"planned on {where}", "reconcile", fields))


def _block(
    tick: _Tick, outcome: Blocked, step: RolloutStep, existing: Sequence[Placement], requests: Sequence[ReplicaRequest]
) -> None:
    """Says why; and where an update lacks room for one more, lets an old replica go first if that makes the room."""
    tick.block(outcome.model, outcome.kind, f"{outcome.reason} {outcome.unblock}".strip())
    old = tick.replicas.get(step.yield_one)
    if old is None or not old.active or _is_freeing(tick):
        return
    request = next(request for request in requests if request.replica == outcome.replica)
    without = [placement for placement in existing if placement.replica != old.id]
    if isinstance(place([request], tick.observation.inventory, without)[0], Placement):
        _take_away(tick, old, "an update needs its devices")


def _is_freeing(tick: _Tick) -> bool:
    """Whether devices are about to come free, so that room may yet appear without taking anything away."""
    held = {placement.replica for placement in _held(tick)}
    return any(replica.id in held and not replica.active for replica in tick.replicas.values())


def _held(tick: _Tick) -> list[Placement]:
    """Placements that hold devices: live ones, and ended ones that Ray has not let go of."""
    return [
        replica.placement
        for replica in tick.replicas.values()
        if replica.live or tick.observation.replicas.get(replica.id, ReplicaObservation()).holds_something
    ]


def _list_actions(tick: _Tick) -> None:
    known = tick.observation.complete  # else what is not seen may well be there, and would be asked for twice
    for replica in tick.replicas.values():
        seen = tick.observation.replicas.get(replica.id, ReplicaObservation())
        if known and replica.state is ReplicaState.RESERVING and seen.reservation is Reservation.NONE:
            tick.actions.append(Reserve(replica))
        elif known and replica.state is ReplicaState.STARTING and seen.phase is Phase.NONE:
            tick.actions.append(Start(replica))
        elif replica.state is ReplicaState.DRAINING:
            if tick.now - replica.since_s >= tick.limits.drain_grace_s:
                tick.actions.append(TellDrain(replica))
        elif replica.state in FINAL and seen.holds_something:
            tick.actions.append(Release(replica.id))
    tick.actions += [Release(replica_id) for replica_id in _unknown(tick.observation, tick.replicas)]


def _unknown(observation: Observation, replicas: Mapping[str, Replica]) -> list[str]:
    """Ids that hold something and are of no replica that we remember."""
    seen = observation.replicas.items()
    return [replica_id for replica_id, held in seen if held.holds_something and replica_id not in replicas]


def _tell_blocked(tick: _Tick, before: Fleet) -> None:
    for name, reason in tick.blocked.items():
        if name not in before.blocked:
            tick.events.append(ClusterEvent("model.blocked", name, reason, "reconcile"))
    for name in before.blocked:
        if name not in tick.blocked and name in tick.models:
            tick.events.append(ClusterEvent("model.unblocked", name, "nothing blocks it any more", "reconcile"))


def _without_old_endings(tick: _Tick) -> tuple[Replica, ...]:
    """Forgets the oldest ended replicas that hold nothing."""
    ended = [
        replica
        for replica in tick.replicas.values()
        if replica.state in FINAL
        and not tick.observation.replicas.get(replica.id, ReplicaObservation()).holds_something
    ]
    ended.sort(key=lambda replica: replica.since_s)
    forgotten = {replica.id for replica in ended[: max(0, len(ended) - tick.limits.ended_kept)]}
    return tuple(replica for replica in tick.replicas.values() if replica.id not in forgotten)
