"""The best rates that replicas have shown, kept with the desired state, and how near each model is to them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict

from megatoken.cluster.controller.state import StateStore
from megatoken.cluster.controller.status import Readings
from megatoken.cluster.decide.efficiency import RATE_S, Best, Efficiency, Reading, Spec, efficiency_of, learn
from megatoken.cluster.decide.fleet import Fleet, Replica
from megatoken.cluster.decide.replica import ReplicaState
from megatoken.cluster.view.text import rates_of
from megatoken.v1 import control_pb2, throughput_pb2

KEPT = "best_rates"  # in the state file


class BestRates:
    """Lives in the controller's event loop."""

    def __init__(self, store: StateStore) -> None:
        self._store = store
        self._best: dict[Spec, Best] = {}
        for spec, values in json.loads(store.get(KEPT) or "[]"):
            self._best[tuple(spec)] = Best(**values)
        self._efficiencies: dict[str, Efficiency] = {}

    def look(
        self, fleet: Fleet, readings: Readings, sample: throughput_pb2.ThroughputSample, now: float, unix_s: float
    ) -> None:
        """Takes what every READY replica does; `now` is monotonic, as the fleet's times are."""
        over_ten = rates_of(sample, int(RATE_S))
        by_model: dict[str, list[Reading]] = {}
        for replica in fleet.replicas:
            load = readings.loads.get(replica.id)
            if replica.state is ReplicaState.READY and load is not None:
                rate = over_ten.get(("replica", replica.id), readings.rates.get(replica.id, 0.0))
                reading = Reading(
                    replica.id, _spec(replica), rate, load.running, load.waiting, max(0.0, now - replica.since_s)
                )
                by_model.setdefault(replica.model, []).append(reading)
        found = learn(self._best, (reading for one in by_model.values() for reading in one), unix_s)
        if found != self._best:
            self._best = dict(found)
            self._store.put(**{KEPT: json.dumps([[spec, asdict(best)] for spec, best in found.items()])})
        queued = readings.queued if len(by_model) == 1 else 0  # routers do not tell whose
        known = ((name, efficiency_of(name, found, one, queued)) for name, one in by_model.items())
        self._efficiencies = {name: efficiency for name, efficiency in known if efficiency is not None}

    def messages(self) -> Iterable[control_pb2.ModelEfficiency]:
        """One a model of which the best is known, by name."""
        for name, efficiency in sorted(self._efficiencies.items()):
            yield control_pb2.ModelEfficiency(
                model=name,
                capacity_tokens_per_s=efficiency.capacity,
                tokens_per_s=efficiency.rate,
                lost=[control_pb2.LostRate(cause=cause, tokens_per_s=lost) for cause, lost in efficiency.lost.items()],
                held_back_by=efficiency.held_back_by,
                best=[
                    control_pb2.BestRate(device_kind=kind, revision=revision, **asdict(best))
                    for (model, revision, kind), best in sorted(self._best.items())
                    if model == name
                ],
            )


def _spec(replica: Replica) -> Spec:
    return replica.model, replica.revision, replica.placement.ranks[0].kind
