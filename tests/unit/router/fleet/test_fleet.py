"""The table of replicas: who is open, what a pool knows of its members, and what it expects of answers."""

from __future__ import annotations

from typing import Any

import pytest

from megatoken.router.fleet.affinity_seeds import seed_of
from megatoken.router.fleet.capacity import Rates
from megatoken.router.fleet.fleet import Endpoint, Member
from tests.support.router_core import CoreFleet


def test_a_new_replica_has_nothing_and_is_not_open_before_it_is_connected() -> None:
    fleet = CoreFleet(replicas=0)
    replica = fleet.state.fleet.add(Member("m-0", "m", "x", 1), fleet.pool)
    assert (replica.open_at, replica.in_flight, replica.leased, replica.others, replica.running) == (-1, 0, 0, 0, 0)
    assert (replica.engine_steps, replica.steps, replica.step_s, replica.rtt_s) == (-1, 0, 0.0, 0.0)
    assert (replica.wait_s, replica.outstanding_tokens, fleet.pool.open) == (0.0, 0, [])
    assert not any((replica.connected, replica.gone, replica.draining, replica.ward, replica.cleared))


@pytest.mark.parametrize(
    ("max_running", "slack", "batch", "limit"),
    [(0, 1.125, 256, 288), (1, 1.0, 1, 1), (10, 1.125, 10, 11), (10, 1.0, 10, 10), (100, 1.5, 100, 150)],
)
def test_a_replica_gets_its_batch_and_the_slack(max_running: int, slack: float, batch: int, limit: int) -> None:
    fleet = CoreFleet(replicas=0, max_running=max_running, admission={"replica_slack": slack})
    replica = fleet.add_replica("m-0")
    assert (replica.capacity.batch, replica.limit) == (batch, limit)


def test_a_new_replica_starts_from_the_rates_of_its_kind_alone() -> None:
    fleet = CoreFleet(replicas=0, max_running=10)
    fleet.pool.rates_by_kind["fast"] = (Rates(0.001, 1e-4, 1e-5), 10)
    assert fleet.add_replica("m-0", device_kind="fast").capacity.rates == Rates(0.001, 1e-4, 1e-5)
    assert fleet.add_replica("m-1", device_kind="other").capacity.rates == Rates(0.02, 0.002, 1e-4)


@pytest.mark.parametrize(
    ("in_flight", "leased", "others", "room"),
    [(0, 0, 0, True), (10, 0, 0, True), (11, 0, 0, False), (8, 1, 1, True), (8, 1, 2, False), (5, 6, 0, False)],
)
def test_everything_that_runs_there_takes_room(in_flight: int, leased: int, others: int, room: bool) -> None:
    fleet = CoreFleet(replicas=1, max_running=10)
    replica = fleet.replicas[0]
    replica.in_flight, replica.leased, replica.others = in_flight, leased, others
    assert replica.has_room() is room


@pytest.mark.parametrize(
    ("decode", "prompt", "wait_s", "tokens"),
    [(100.0, 0.0, 10.0, 100), (0.0, 100.0, 2.0, 100), (100.4, 100.4, 12.048, 201), (-5.0, 2.0, -0.46, 0)],
)
def test_work_that_waits_is_counted_in_seconds_and_tokens(
    decode: float, prompt: float, wait_s: float, tokens: int
) -> None:
    replica = CoreFleet(replicas=1).replicas[0]
    replica.capacity.decode_tokens_per_s, replica.capacity.prefill_tokens_per_s = 10.0, 50.0
    replica.decode_outstanding, replica.prompt_outstanding = decode, prompt
    assert (replica.wait_s, replica.outstanding_tokens) == (pytest.approx(wait_s), tokens)


@pytest.mark.parametrize(
    ("field", "value", "opened"),
    [
        ("connected", False, False),
        ("gone", True, False),
        ("draining", True, False),
        ("ward", True, False),
        ("in_flight", 11, False),
        ("in_flight", 10, True),
        ("ejected_until_s", 100.1, False),
        ("ejected_until_s", 100.0, True),
        ("ejected_until_s", 99.9, True),
    ],
)
def test_a_replica_is_open_unless_something_speaks_against_it(field: str, value: Any, opened: bool) -> None:
    fleet = CoreFleet(replicas=3, max_running=10)
    replica = fleet.replicas[0]
    setattr(replica, field, value)
    fleet.state.fleet.refresh(replica, 100.0)
    assert (replica in fleet.pool.open) is opened
    assert (replica.open_at >= 0) is opened
    fleet.state.fleet.refresh(replica, 100.0)
    assert fleet.pool.open.count(replica) == int(opened)
    assert places(fleet) == list(range(len(fleet.pool.open)))


def places(fleet: CoreFleet) -> list[int]:
    return [replica.open_at for replica in fleet.pool.open]


def test_an_open_circuit_closes_the_replica_until_it_has_recovered() -> None:
    fleet = CoreFleet(replicas=1)
    replica = fleet.replicas[0]
    replica.circuit.trip(100.0)
    fleet.state.fleet.refresh(replica, 100.0)
    assert fleet.pool.open == []
    replica.circuit.succeeded()
    fleet.state.fleet.refresh(replica, 100.0)
    assert fleet.pool.open == [replica]


@pytest.mark.parametrize("closed", [[0], [3], [1, 0], [0, 1, 2, 3], [3, 2, 1, 0], [2, 3]])
def test_every_open_replica_knows_its_place(closed: list[int]) -> None:
    fleet = CoreFleet(replicas=4)
    for at in closed:
        fleet.replicas[at].draining = True
        fleet.state.fleet.refresh(fleet.replicas[at], 100.0)
        assert fleet.replicas[at].open_at == -1
        assert places(fleet) == list(range(len(fleet.pool.open)))
    assert set(fleet.pool.open) == {fleet.replicas[at] for at in range(4) if at not in closed}


def test_a_removed_replica_keeps_its_index_until_it_is_released() -> None:
    fleet = CoreFleet(replicas=3)
    table = fleet.state.fleet
    removed = fleet.replicas[1]
    table.remove(removed)
    assert (removed.gone, removed in fleet.pool.replicas, removed in fleet.pool.open) == (True, False, False)
    assert ("m-1", 1) not in table.by_name
    assert fleet.add_replica("m-3").index == 3
    table.remove(removed)
    table.release(removed)
    assert [None if one is None else one.name for one in table.replicas] == ["m-0", None, "m-2", "m-3"]
    assert [one.name for one in table.live()] == ["m-0", "m-2", "m-3"]
    assert fleet.add_replica("m-4").index == 1
    assert fleet.add_replica("m-5").index == 4


def test_a_removed_replica_takes_another_incarnation_of_its_name_nothing() -> None:
    fleet = CoreFleet(replicas=1)
    table = fleet.state.fleet
    following = table.add(Member("m-0", "m", "x", 2), fleet.pool)
    table.remove(fleet.replicas[0])
    assert table.by_name == {("m-0", 2): following}
    assert fleet.pool.replicas == [following]


def test_a_pool_knows_what_its_members_state() -> None:
    fleet = CoreFleet(replicas=0)
    assert (fleet.pool.max_model_len, fleet.pool.vocab_size) == (0, 0)
    one = fleet.add_replica("m-0", max_model_len=100, vocab_size=500, loras=("a", "b"))
    two = fleet.add_replica("m-1", max_model_len=300, vocab_size=0, loras=("b",))
    three = fleet.add_replica("m-2", max_model_len=200, vocab_size=400)
    assert (fleet.pool.max_model_len, fleet.pool.vocab_size) == (300, 400)
    assert fleet.pool.adapters == {"a": [one], "b": [one, two]}
    assert fleet.pool.seeds.tolist() == [int(seed_of(name)) for name in ("m-0", "m-1", "m-2")]
    for replica in (two, three):
        fleet.state.fleet.remove(replica)
    assert (fleet.pool.max_model_len, fleet.pool.vocab_size, fleet.pool.adapters) == (
        100,
        500,
        {"a": [one], "b": [one]},
    )


def test_a_seed_is_the_same_in_every_process() -> None:
    assert int(seed_of("m-0")) == 354783152265835419


def speeds(fleet: CoreFleet, *tokens_per_s: float) -> list[Endpoint]:
    for replica, rate in zip(fleet.replicas, tokens_per_s, strict=True):
        replica.capacity.decode_tokens_per_s = rate
    return fleet.replicas


def test_the_rate_of_a_model_is_that_of_those_that_serve_once_one_was_measured() -> None:
    fleet = CoreFleet(replicas=3)
    first, second, third = speeds(fleet, 1.0, 20.0, 300.0)
    fleet.pool.gauge()
    assert fleet.pool.measured_tokens_per_s == 0.0
    second.capacity.measured = True
    fleet.pool.gauge()
    assert fleet.pool.measured_tokens_per_s == 321.0
    third.draining = True
    first.connected = False
    fleet.pool.gauge()
    assert fleet.pool.measured_tokens_per_s == 20.0
    second.draining = True
    fleet.pool.gauge()
    assert fleet.pool.measured_tokens_per_s == 0.0


@pytest.mark.parametrize(
    ("answers", "max_tokens", "expected"),
    [
        ([], 100, 100),
        ([(10, 100)] * 7, 100, 100),
        ([(10, 100)] * 8, 100, 10),
        ([(10, 100)] * 9, 100, 10),
        ([(10, 100)] * 9, 3, 1),
        ([(10, 100)] * 9, 26, 3),
        ([(0, 100)] * 9, 100, 1),
        ([(10, 10)] * 8 + [(10, 190)] * 2, 100, 22),  # long allowances weigh more: 100 of 460
        ([(50, 20)] * 8, 100, 100),  # more than was allowed counts as all of it
        ([(0, 0)] * 8, 100, 1),
        ([(1, 1)] * 8, 100, 100),
    ],
)
def test_answers_are_expected_to_take_the_share_that_they_took(
    answers: list[tuple[int, int]], max_tokens: int, expected: int
) -> None:
    pool = CoreFleet(replicas=0).pool
    for tokens, allowed in answers:
        pool.saw_output(tokens, allowed)
    assert pool.outputs_seen == len(answers)
    assert pool.expected_output(max_tokens) == expected


def test_an_answer_among_many_counts_one_in_256() -> None:
    pool = CoreFleet(replicas=0).pool
    for _ in range(400):
        pool.saw_output(0, 100)
    pool.saw_output(100, 100)
    assert pool.output_share == pytest.approx(1 / 256)
    pool.saw_output(100, 356)
    assert pool.output_share == pytest.approx((100 / 256 + (100 - 100 / 256) / 256) / 101)


def test_the_two_hundredth_answer_counts_one_in_two_hundred() -> None:
    pool = CoreFleet(replicas=0).pool
    for _ in range(199):
        pool.saw_output(0, 100)
    pool.saw_output(100, 100)
    assert pool.output_share == pytest.approx(1 / 200)
