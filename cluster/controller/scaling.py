"""Asks for as many replicas as cluster/autoscale decides, and keeps what each decision rests on, for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from megatoken.cluster.autoscale.decide import Demand, Memory, Size, Sizing, decide
from megatoken.cluster.autoscale.demand import Counts, DemandMeter
from megatoken.cluster.controller.desired_state import DesiredState
from megatoken.cluster.controller.status import Readings
from megatoken.cluster.decide.fleet import Fleet, Replica
from megatoken.cluster.decide.replica import ReplicaState
from megatoken.cluster.spec.model import ModelSpec
from megatoken.cluster.view.autoscale import scaling_text
from megatoken.metrics import ITL_BUCKETS_S, TTFT_BUCKETS_S
from megatoken.v1 import control_pb2, router_pb2

LOOK_S: Final = 1.0
START_S: Final = 60.0  # of a model that never started here


class Autoscaler:
    """Lives in the controller's event loop."""

    def __init__(self, desired_state: DesiredState) -> None:
        self._desired = desired_state
        self._meters: dict[str, DemandMeter] = {}
        self._memories: dict[str, Memory] = {}
        self._starts: dict[str, float] = {}  # seconds that the last start of a model took
        self._due_s = 0.0
        self.messages: dict[str, control_pb2.Autoscaling] = {}
        """The last decision by model."""

    def look(
        self, fleet: Fleet, routers: Mapping[str, router_pb2.RouterStatus], readings: Readings, now: float
    ) -> None:
        """Decides for every model that has bounds. `routers`: of those that answer, by name. `now` is monotonic."""
        if now < self._due_s or self._desired.stopping:
            return
        self._due_s = now + LOOK_S
        models = [model for model in self._desired.spec.models if model.autoscale is not None]
        for gone in self._memories.keys() - {model.name for model in models}:
            for kept in (self._memories, self._meters, self.messages):
                kept.pop(gone, None)
        for model in models:
            self._decide(model, fleet, routers, readings, now)

    def _decide(
        self,
        model: ModelSpec,
        fleet: Fleet,
        routers: Mapping[str, router_pb2.RouterStatus],
        readings: Readings,
        now: float,
    ) -> None:
        spec = model.autoscale
        assert spec is not None
        meter = self._meters.setdefault(model.name, DemandMeter())
        counted = {name: _counts(status, model.name) for name, status in routers.items()}
        meter.read(counted, now)
        ready = [replica for replica in fleet.of_model(model.name) if replica.state is ReplicaState.READY]
        loads = [readings.loads[replica.id] for replica in ready if replica.id in readings.loads]
        rate = sum(readings.rates.get(replica.id, 0.0) for replica in ready)
        demand = meter.demand(TTFT_BUCKETS_S, ITL_BUCKETS_S, sum(load.waiting for load in loads), rate)
        slots = max((replica.facts.max_running for replica in ready if replica.facts is not None), default=0)
        started = [took_s for replica in ready if (took_s := _start_s(replica))]
        self._starts[model.name] = max(started) if started else self._starts.get(model.name, START_S)
        size = Size(model.replicas, len(ready), slots, self._starts[model.name])
        decision = decide(spec, demand, size, self._memories.get(model.name, Memory()), now)
        self._memories[model.name] = decision.memory
        message = self.messages[model.name] = _message(model, demand, size, decision)
        if decision.target != model.replicas:
            self._desired.resize(model.name, decision.target, scaling_text(message))


def _counts(status: router_pb2.RouterStatus, model: str) -> Counts:
    for entry in status.models:
        if entry.model == model:
            return Counts(
                entry.arrived_requests,
                entry.arrived_work_s,
                entry.measured,
                entry.queued,
                entry.queued_work_s,
                entry.running,
                tuple(entry.first_token),
                tuple(entry.between_tokens),
            )
    return Counts()


def _start_s(replica: Replica) -> float:
    return sum(seconds for _, seconds in replica.facts.start_s) if replica.facts is not None else 0.0


def _message(model: ModelSpec, demand: Demand, size: Size, decision: Sizing) -> control_pb2.Autoscaling:
    spec = model.autoscale
    assert spec is not None
    return control_pb2.Autoscaling(
        min_replicas=spec.min_replicas,
        max_replicas=spec.max_replicas,
        target=decision.target,
        why=decision.why,
        need=decision.need,
        load=demand.load,
        requests_per_s=demand.requests_per_s,
        waiting=demand.waiting,
        ttft_p99_s=demand.ttft_s,
        itl_p99_s=demand.itl_s,
        utilisation=spec.utilisation * decision.memory.confidence,
        start_s=size.start_s,
    )
