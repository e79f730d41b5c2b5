"""Turns what is observed of one replica into the event it means. Pure; the reconciler calls it."""

from __future__ import annotations

from cluster.fleet import Limits, Observation, Phase, Replica, ReplicaObservation, Reservation
from cluster.replica import ReplicaEvent, ReplicaState
from cluster.spec_model import ModelSpec

NODE_LOST = "node lost"


def event_for(
    replica: Replica, model: ModelSpec | None, observation: Observation, limits: Limits, now: float
) -> tuple[ReplicaEvent, str] | None:
    """The event and its reason, or None when nothing happened to it."""
    seen = observation.replicas.get(replica.id, ReplicaObservation())
    lost = _lost_node(replica, observation)
    if lost:
        return ReplicaEvent.FAIL, lost
    if seen.phase is Phase.EXITED:
        return ReplicaEvent.FAIL, seen.reason or "its worker process ended"
    in_state_s = now - replica.since_s
    match replica.state:
        case ReplicaState.RESERVING:
            if seen.reservation is Reservation.GRANTED:
                return ReplicaEvent.RESERVED, ""
            if in_state_s > limits.reserve_timeout_s:
                return ReplicaEvent.FAIL, f"Ray did not grant its devices within {limits.reserve_timeout_s:.0f} s"
        case ReplicaState.STARTING:
            if seen.phase is Phase.SERVING and seen.facts is not None:
                return ReplicaEvent.SERVING, ""
            timeout_s = model.start_timeout_s if model else limits.reserve_timeout_s
            if in_state_s > timeout_s:
                return ReplicaEvent.FAIL, f"it did not serve within start_timeout_s = {timeout_s:.0f} s"
            return _if_reservation_lost(seen, observation)
        case ReplicaState.READY:
            return _if_gone(seen, observation)
        case ReplicaState.DRAINING:
            return _drained(replica, seen, limits, now) or _if_gone(seen, observation)
    return None


def _drained(replica: Replica, seen: ReplicaObservation, limits: Limits, now: float) -> tuple[ReplicaEvent, str] | None:
    if seen.unfinished == 0:
        return ReplicaEvent.DRAINED, f"drained ({replica.drain_cause})"
    if replica.drain_deadline_s is not None and now > replica.drain_deadline_s + limits.drain_overtime_s:
        left = "some" if seen.unfinished is None else str(seen.unfinished)
        return ReplicaEvent.DRAINED, f"drain deadline passed with {left} requests left ({replica.drain_cause})"
    return None


def _if_gone(seen: ReplicaObservation, observation: Observation) -> tuple[ReplicaEvent, str] | None:
    if observation.complete and seen.phase is Phase.NONE:
        return ReplicaEvent.FAIL, "its worker is gone"
    return _if_reservation_lost(seen, observation)


def _if_reservation_lost(seen: ReplicaObservation, observation: Observation) -> tuple[ReplicaEvent, str] | None:
    if observation.complete and seen.reservation is Reservation.NONE:
        return ReplicaEvent.FAIL, "Ray no longer holds its devices"
    return None


def _lost_node(replica: Replica, observation: Observation) -> str:
    if not observation.complete:
        return ""
    for node_id in replica.placement.nodes:
        node = observation.inventory.node(node_id)
        if node is None or not node.alive:
            return f"{NODE_LOST}: {node.title if node else node_id}"
    return ""
