"""Best rates outlive the controller, and come from the collective's window where there is one."""

from pathlib import Path

import pytest

from megatoken.cluster.controller.monitoring.rates import BestRates
from megatoken.cluster.controller.state import StateStore
from megatoken.cluster.controller.status import Readings
from megatoken.cluster.decide.fleet import Fleet, Replica
from megatoken.cluster.decide.replica import ReplicaState
from megatoken.cluster.placement.place import Placement, Rank
from megatoken.v1 import throughput_pb2, tokens_pb2

READY = Replica(
    "m-1", "m", "r1", 1, Placement("m-1", "m", (Rank(0, "n", 0, "cpu"),)), 0.0, ReplicaState.READY, since_s=100.0
)


def sample(tokens_per_s: float) -> throughput_pb2.ThroughputSample:
    found = throughput_pb2.ThroughputSample()
    row = found.rows.add(kind="replica", name="m-1")
    row.windows.add(seconds=10, generated_tokens_per_s=tokens_per_s)
    return found


def readings(rate: float, running: int = 8) -> Readings:
    return Readings({"m-1": tokens_pb2.Load(running=running)}, {"m-1": rate})


@pytest.fixture
def store(tmp_path: Path) -> StateStore:
    return StateStore(tmp_path / "state.sqlite")


def test_the_best_is_the_collectives_and_a_restarted_controller_knows_it(store: StateStore) -> None:
    fleet = Fleet((READY,))
    rates = BestRates(store)
    rates.look(fleet, readings(77.0), sample(80.0), now=150.0, unix_s=5.0)
    again = BestRates(store)
    assert list(again.messages()) == [], "nothing is known of now yet"
    again.look(fleet, readings(77.0, running=2), sample(20.0), now=160.0, unix_s=6.0)
    (told,) = again.messages()
    assert (told.model, told.capacity_tokens_per_s, told.tokens_per_s) == ("m", 80.0, 20.0)
    assert {loss.cause: loss.tokens_per_s for loss in told.lost}["idle"] == 60.0
    (best,) = told.best
    assert (best.revision, best.device_kind, best.running, best.replica, best.unix_s) == ("r1", "cpu", 8, "m-1", 5.0)


def test_without_agents_the_workers_own_rate_counts(store: StateStore) -> None:
    rates = BestRates(store)
    rates.look(Fleet((READY,)), readings(33.0), throughput_pb2.ThroughputSample(), now=150.0, unix_s=5.0)
    (told,) = rates.messages()
    assert told.capacity_tokens_per_s == 33.0


def test_a_replica_that_does_not_serve_is_no_capacity(store: StateStore) -> None:
    rates = BestRates(store)
    rates.look(Fleet((READY,)), readings(33.0), throughput_pb2.ThroughputSample(), now=150.0, unix_s=5.0)
    rates.look(Fleet(()), readings(33.0), throughput_pb2.ThroughputSample(), now=151.0, unix_s=6.0)
    assert list(rates.messages()) == []
