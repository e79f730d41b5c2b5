"""Turns what is observed of one replica into the event it means. Pure; the reconciler calls it."""

from __future__ import annotations

from megatoken.cluster.decide.exit_cause import ExitCause
from megatoken.cluster.decide.fleet import Limits, Observation, Phase, Replica, ReplicaObservation, Reservation
from megatoken.cluster.decide.liveness import Hang, HangSeen
from megatoken.cluster.decide.replica import ReplicaEvent, ReplicaState
from megatoken.cluster.placement.text import rank_text
from megatoken.cluster.spec.model import ModelSpec

Met = tuple[ReplicaEvent, str, ExitCause]
"""The event, its reason for people, and the cause where the replica ends."""


def event_for(
    replica: Replica, model: ModelSpec | None, observation: Observation, limits: Limits, now: float
) -> Met | None:
    """What happened to it, or None when nothing did."""
    seen = observation.replicas.get(replica.id, ReplicaObservation())
    lost = _lost_node(replica, observation)
    if lost:
        return ReplicaEvent.FAIL, lost, ExitCause.NODE_LOST
    if seen.phase is Phase.EXITED:
        return ReplicaEvent.FAIL, seen.reason or "its worker process ended", seen.cause
    in_state_s = now - replica.since_s
    match replica.state:
        case ReplicaState.RESERVING:
            if seen.reservation is Reservation.GRANTED:
                return ReplicaEvent.RESERVED, "", ExitCause.UNKNOWN
            if in_state_s > limits.reserve_timeout_s:
                reason = f"Ray did not grant its devices within {limits.reserve_timeout_s:.0f} s"
                return ReplicaEvent.FAIL, reason, ExitCause.RESERVE_TIMEOUT
        case ReplicaState.STARTING:
            if seen.phase is Phase.SERVING and seen.facts is not None:
                return ReplicaEvent.SERVING, "", ExitCause.UNKNOWN
            timeout_s = model.start_timeout_s if model else limits.reserve_timeout_s
            if in_state_s > timeout_s:
                reason = f"it did not serve within start_timeout_s = {timeout_s:.0f} s"
                return ReplicaEvent.FAIL, reason, ExitCause.START_TIMEOUT
            return _if_reservation_lost(seen, observation)
        case ReplicaState.READY:
            return _if_gone(seen, observation) or _if_hung(replica, seen, observation)
        case ReplicaState.DRAINING:
            gone = _if_gone(seen, observation) or _if_hung(replica, seen, observation)
            return _drained(replica, seen, limits, now) or gone
    return None


_HANGS = {
    Hang.NO_ANSWER: (ExitCause.NO_ANSWER, "its worker has not answered for"),
    Hang.NO_STEP: (ExitCause.HUNG, "its engine has requests and has made no step for"),
    Hang.NO_TOKEN: (ExitCause.HUNG, "its idle engine was asked for a token and has made no step for"),
}


def _if_hung(replica: Replica, seen: ReplicaObservation, observation: Observation) -> Met | None:
    if seen.hang is None:
        return None
    cause, text = _HANGS[seen.hang.hang]
    where = _culprits(replica, seen.hang, observation) or [
        rank_text(rank, observation.inventory) for rank in replica.placement.ranks
    ]
    return ReplicaEvent.FAIL, f"{text} {seen.hang.seconds:.0f} s ({', '.join(where)})", cause


def _culprits(replica: Replica, hang: HangSeen, observation: Observation) -> list[str]:
    """Those of its processes that cannot run, for people; empty when none was found."""
    ranks = {f"rank {rank.rank}": rank_text(rank, observation.inventory) for rank in replica.placement.ranks}
    told = []
    for part in hang.parts:
        node = observation.inventory.node(part.node)
        title = node.title if node else part.node
        if not part.part:
            told.append(f"{title} does not answer")
        elif part.state:
            who = ranks.get(part.part, f"its {part.part} on {title}")
            told.append(f"{who}: process {part.pid} is {part.state}")
    return told


def _drained(replica: Replica, seen: ReplicaObservation, limits: Limits, now: float) -> Met | None:
    if seen.unfinished == 0:
        return ReplicaEvent.DRAINED, f"drained ({replica.drain_cause})", ExitCause.DRAINED
    if replica.drain_deadline_s is not None and now > replica.drain_deadline_s + limits.drain_overtime_s:
        left = "some" if seen.unfinished is None else str(seen.unfinished)
        reason = f"drain deadline passed with {left} requests left ({replica.drain_cause})"
        return ReplicaEvent.DRAINED, reason, ExitCause.DRAINED
    return None


def _if_gone(seen: ReplicaObservation, observation: Observation) -> Met | None:
    if observation.complete and seen.phase is Phase.NONE:
        return ReplicaEvent.FAIL, "its worker is gone", ExitCause.ACTOR_LOST
    return _if_reservation_lost(seen, observation)


def _if_reservation_lost(seen: ReplicaObservation, observation: Observation) -> Met | None:
    if observation.complete and seen.reservation is Reservation.NONE:
        return ReplicaEvent.FAIL, "Ray no longer holds its devices", ExitCause.DEVICES_LOST
    return None


def _lost_node(replica: Replica, observation: Observation) -> str:
    if not observation.complete:
        return ""
    for node_id in replica.placement.nodes:
        node = observation.inventory.node(node_id)
        if node is None or not node.alive:
            return f"node lost: {node.title if node else node_id}"
    return ""
