"""The small pure parts by themselves: queue, capacity, circuit, budget, percentiles, ceiling."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatoken.router.core.retry_budget import RetryBudget
from megatoken.router.fleet.capacity import Capacity, Rates
from megatoken.router.fleet.circuit import Circuit, CircuitState
from megatoken.router.fleet.fair_queue import FairQueue
from megatoken.router.fleet.limits import ceiling
from megatoken.router.streams.latency import SlidingHistogram
from tests.support.router_core import CoreFleet


@dataclass(eq=False)
class Item:
    tenant: str
    cost_tokens: int = 10
    priority: int = 0


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(1, 100), st.sampled_from(["push", "front", "pop", "remove"]))
    )
)
def test_the_queue_hands_everything_out_once_and_counts_right(steps: list[tuple[str, int, str]]) -> None:
    queue, waiting = FairQueue(), []
    for tenant, cost, step in steps:
        if step in ("push", "front"):
            item = Item(tenant, cost)
            (queue.push if step == "push" else queue.push_front)(item)
            waiting.append(item)
        elif waiting and step == "remove":
            queue.remove(waiting.pop(len(waiting) // 2))
        elif step == "pop":
            item = queue.pop()
            assert (item is None) == (not waiting)
            if item is not None:
                waiting.remove(item)
        assert (len(queue), queue.tokens) == (len(waiting), sum(item.cost_tokens for item in waiting))
        assert set(map(id, queue.items())) == set(map(id, waiting))


def test_what_was_removed_from_the_queue_is_not_kept() -> None:
    queue = FairQueue()
    first = Item("a", 10)
    queue.push(first)
    for turn in range(5000):
        item = Item("b", 10)
        (queue.push if turn % 3 else queue.push_front)(item)
        queue.remove(item)
    assert (len(queue), len(queue.items())) == (1, 1)
    assert len(queue._heap) + len(queue._front) <= 130
    assert queue.pop() is first


def test_tenants_share_by_tokens_and_weight() -> None:
    queue = FairQueue()
    for _ in range(200):
        queue.push(Item("small", 10))
        queue.push(Item("large", 100))
        queue.push(Item("paying", 10), weight=3.0)
    served = {"small": 0, "large": 0, "paying": 0}
    for _ in range(150):
        item = queue.pop()
        assert item is not None
        served[item.tenant] += item.cost_tokens
    assert served["paying"] == pytest.approx(3 * served["small"], rel=0.15)
    assert served["large"] == pytest.approx(served["small"], abs=150)


@pytest.mark.parametrize("load", [0.1, 0.5, 1.0])
def test_capacity_at_a_light_load_is_still_that_of_a_full_batch(load: float) -> None:
    true = Rates(step_s=0.01, token_s=0.0002, prompt_s=0.00005)
    capacity = Capacity(batch=64)
    for i in range(60):
        running = max(1, round(64 * load) + (i % 5 - 2))
        steps, prompt = 20, 500 * (i % 3)
        busy_s = steps * (true.step_s + true.token_s * running) + prompt * true.prompt_s
        capacity.observe(busy_s, steps * running, prompt, running)
    assert capacity.decode_tokens_per_s == pytest.approx(true.decode_tokens_per_s(64), rel=0.35)
    assert capacity.prefill_tokens_per_s == pytest.approx(true.prefill_tokens_per_s(), rel=0.35)


def test_capacity_follows_a_replica_that_became_slow() -> None:
    capacity = Capacity(batch=10)
    for speed in [1.0] * 50 + [4.0] * 200:
        capacity.observe(speed * 20 * 0.02, 200, 0, 10)
    assert capacity.decode_tokens_per_s == pytest.approx(10 / 0.08, rel=0.1)


def test_nonsense_totals_change_nothing() -> None:
    capacity = Capacity(batch=10)
    before = capacity.rates
    capacity.observe(0.0, 100, 0, 1)
    capacity.observe(1.0, 0, 0, 1)
    assert capacity.rates is before
    assert not capacity.measured


def test_a_new_replica_starts_from_its_kind() -> None:
    capacity = Capacity(batch=64)
    capacity.adopt(Rates(0.001, 1e-6, 1e-6))
    assert capacity.decode_tokens_per_s > 50_000


EVENTS = ("failed", "succeeded", "probe_early", "probe_due")
AFTER = {  # state -> event -> state, with one failure to open
    CircuitState.CLOSED: dict.fromkeys(EVENTS, CircuitState.CLOSED) | {"failed": CircuitState.OPEN},
    CircuitState.OPEN: dict.fromkeys(EVENTS, CircuitState.OPEN)
    | {"probe_due": CircuitState.HALF_OPEN, "succeeded": CircuitState.CLOSED},
    CircuitState.HALF_OPEN: dict.fromkeys(EVENTS, CircuitState.HALF_OPEN)
    | {"failed": CircuitState.OPEN, "succeeded": CircuitState.CLOSED},
}


@pytest.mark.parametrize("state", list(CircuitState))
@pytest.mark.parametrize("event", EVENTS)
def test_the_circuit_by_table(state: CircuitState, event: str) -> None:
    circuit = Circuit(failures_to_open=1, open_s=1.0, max_open_s=8.0, state=state, until_s=10.0)
    if event == "failed":
        circuit.failed(5.0)
    elif event.startswith("probe"):
        begun = circuit.begin_probe(5.0 if event == "probe_early" else 11.0)
        assert begun is (state is CircuitState.OPEN and event == "probe_due")
    else:
        circuit.succeeded()
    assert circuit.state is AFTER[state][event]
    assert circuit.closed is (circuit.state is CircuitState.CLOSED)


def test_pauses_double_up_to_their_bound() -> None:
    circuit = Circuit(failures_to_open=1, open_s=1.0, max_open_s=5.0)
    pauses, now = [], 0.0
    for _ in range(5):
        circuit.failed(now)
        pauses.append(circuit.until_s - now)
        now = circuit.until_s
        assert circuit.begin_probe(now)
    assert pauses == [1.0, 2.0, 4.0, 5.0, 5.0]


def test_one_probe_at_a_time() -> None:
    circuit = Circuit(1, 1.0, 8.0)
    circuit.failed(0.0)
    assert [circuit.begin_probe(now) for now in (0.5, 1.0, 1.1)] == [False, True, False]
    assert not circuit.closed
    circuit.failed(1.2)
    assert [circuit.begin_probe(now) for now in (2.5, 3.2)] == [False, True]


def test_the_retry_budget_forgets_after_its_window() -> None:
    budget = RetryBudget(ratio=0.5, floor=1)
    for _ in range(4):
        budget.started(100.0)
    assert [budget.take(0, 100.0) for _ in range(4)] == [True, True, True, False]
    assert budget.take(8, 100.0)  # eight live requests allow four more
    assert budget.take(0, 111.0)
    assert not budget.take(0, 111.0)


def test_percentiles_are_right_to_a_bucket_and_slide() -> None:
    histogram = SlidingHistogram()
    for i in range(1, 1001):
        histogram.add(i / 1000, 0.0)
    assert histogram.percentiles_ms((0.5, 0.99), 1.0) == pytest.approx([500, 990], rel=0.08)
    assert histogram.percentiles_ms((0.5,), 100.0) == []


def test_asking_for_percentiles_from_another_thread_changes_nothing() -> None:
    histogram = SlidingHistogram()
    histogram.add(1.0, 5.0)
    assert histogram.percentiles_ms((0.5,), 45.0) == pytest.approx([1000], rel=0.08)
    assert histogram.percentiles_ms((0.5,), 500.0) == []
    assert [since for since, _ in histogram._slices] == [0.0]
    histogram.add(1.0, 500.0)
    assert len(histogram._slices) == 1


def test_the_ceiling_names_what_holds_back() -> None:
    fleet = CoreFleet(replicas=2, max_running=10)
    assert ceiling(fleet.state.fleet) == (1.0, "idle")
    for replica in fleet.replicas:
        replica.capacity.measured = True
        replica.in_flight = 8
        replica.decode_outstanding = 100.0
    assert ceiling(fleet.state.fleet)[1] == ""
    fleet.replicas[0].decode_outstanding = 900.0
    share, why = ceiling(fleet.state.fleet)
    assert (round(share, 2), why) == (0.56, "imbalance")
    fleet.replicas[0].capacity.measured = False
    assert ceiling(fleet.state.fleet)[1] == "ramp"
