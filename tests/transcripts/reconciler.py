"""Transcripts of the reconciler: what is wanted and what is seen in, every action, move and block out.

nodes n0=2 n1=1          machines by their CPU slots; again: the new inventory
want m=2 [surge=..]      a model and its replicas, with fields of its spec; m=0 scales it away
see m-1 granted|starting|serving|exited [cause=..] [reason=..] | gone
unfinished m-1 3         requests that a draining worker still has
drain m-1 | drain-node n0 | stop
tick [seconds] [blind]   one turn; blind: Ray did not answer
"""

from __future__ import annotations

from dataclasses import replace

from megatoken.cluster.decide.exit_cause import ExitCause
from megatoken.cluster.decide.fleet import (
    Action,
    Desired,
    Fleet,
    Limits,
    Observation,
    Phase,
    Release,
    ReplicaObservation,
    Reservation,
    Reserve,
    RollBack,
    Start,
    TellDrain,
    WorkerFacts,
)
from megatoken.cluster.decide.reconciler import reconcile
from megatoken.cluster.inventory.topology import Device, Inventory, Node
from megatoken.cluster.spec.model import ModelSpec
from tests.transcripts.transcript import Command

LIMITS = Limits(reserve_timeout_s=30.0, backoff_s=1.0, backoff_max_s=8.0)
FACTS = WorkerFacts("127.0.0.1:1", 1, "simulated")
SEEN = {
    "pending": ReplicaObservation(Reservation.PENDING),
    "granted": ReplicaObservation(Reservation.GRANTED),
    "starting": ReplicaObservation(Reservation.GRANTED, Phase.STARTING),
    "serving": ReplicaObservation(Reservation.GRANTED, Phase.SERVING, FACTS),
    "exited": ReplicaObservation(Reservation.GRANTED, Phase.EXITED, FACTS),
}


class ReconcilerScript:
    """One transcript's cluster."""

    def __init__(self) -> None:
        self._desired = Desired(1, ())
        self._inventory = Inventory()
        self._fleet = Fleet()
        self._seen: dict[str, ReplicaObservation] = {}
        self._now = 0.0

    def run(self, command: Command) -> list[str]:
        match command.name:
            case "nodes":
                self._inventory = Inventory(
                    tuple(
                        Node(name, f"10.0.0.{number}", tuple(Device("cpu", at) for at in range(int(slots))))
                        for number, (name, slots) in enumerate(command.options.items())
                    )
                )
            case "want":
                self._want(command)
            case "see":
                self._see(command)
            case "unfinished":
                name, count = command.words
                self._seen[name] = replace(self._seen[name], unfinished=int(count))
            case "drain":
                self._desired = replace(self._desired, drain_requests={command.words[0]: command.number("timeout", 30)})
            case "drain-node":
                self._desired = replace(self._desired, drained_nodes=frozenset(command.words))
            case "stop":
                self._desired = replace(self._desired, stopping=True)
            case "tick":
                return self._tick(command)
            case _:
                raise ValueError(f"no such command: {command.name}")
        return []

    def _want(self, command: Command) -> None:
        (name, replicas), *fields = command.options.items()
        others = tuple(model for model in self._desired.models if model.name != name)
        wanted = ModelSpec.model_validate(
            {"name": name, "engine": "simulated", "replicas": int(replicas), **dict(fields)}
        )
        self._desired = replace(self._desired, models=(*others, wanted), generation=self._desired.generation + 1)

    def _see(self, command: Command) -> None:
        name, what = command.words
        if what == "gone":
            self._seen.pop(name, None)
            return
        cause = ExitCause(command.options["cause"]) if "cause" in command.options else ExitCause.UNKNOWN
        self._seen[name] = replace(SEEN[what], reason=command.options.get("reason", ""), cause=cause)

    def _tick(self, command: Command) -> list[str]:
        times = [word for word in command.words if word != "blind"]
        self._now += float(times[0]) if times else 1.0
        observation = Observation(self._inventory, dict(self._seen), "blind" not in command.words)
        plan = reconcile(self._desired, self._fleet, observation, LIMITS, self._now)
        lines = [f"{event.subject}: {event.message}" for event in plan.events]
        lines += [f"=> {told(action)}" for action in plan.actions]
        for name, why in sorted(plan.fleet.blocked.items()):
            if self._fleet.blocked.get(name) != why:
                lines.append(f"{name} blocked by {why.kind}")
        lines += [f"{name} blocked no more" for name in sorted(set(self._fleet.blocked) - set(plan.fleet.blocked))]
        self._fleet = plan.fleet
        return lines


def told(action: Action) -> str:
    """An action on one line."""
    match action:
        case Reserve(replica):
            return f"reserve {replica.id} on " + ", ".join(f"{r.node}:{r.device}" for r in replica.placement.ranks)
        case Start(replica):
            return f"start {replica.id}"
        case TellDrain(replica):
            return f"tell {replica.id} to drain"
        case Release(name):
            return f"release {name}"
        case RollBack(model, _):
            return f"roll back {model}"
    raise TypeError(action)
