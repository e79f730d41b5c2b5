"""What time alone brings about: at which moment, to whom, and what the client is told."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatoken.router.core import upkeep
from megatoken.router.core.lifecycle import RequestState
from megatoken.router.core.request import Request
from megatoken.router.fleet.circuit import CircuitState
from megatoken.v1 import tokens_pb2
from tests.support.router_core import ERROR, CoreFleet

UNIX_S = 5000.0


def tick(fleet: CoreFleet, after_s: float = 0.0) -> None:
    upkeep.tick(fleet.state, fleet.now + after_s, UNIX_S)


def error_of(fleet: CoreFleet, request: Request) -> tuple[int, str]:
    end = fleet.end(request)
    assert end is not None
    assert end.reason == ERROR
    return end.code, end.message


@pytest.mark.parametrize(
    ("draining", "deadline_unix_s", "moved"),
    [
        (True, 0.0, False),
        (True, 0.5, True),
        (True, 1.0, True),
        (True, UNIX_S - 0.001, True),
        (True, UNIX_S, True),
        (True, UNIX_S + 0.001, False),
        (False, UNIX_S - 1, False),
    ],
)
def test_a_drained_replica_s_requests_move_at_its_deadline_and_0_means_none(
    draining: bool, deadline_unix_s: float, moved: bool
) -> None:
    fleet = CoreFleet(replicas=2)
    request = fleet.submit()
    fleet.tokens(request, 1)
    replica = fleet.replica_of(request)
    replica.draining = draining
    replica.member = replace(replica.member, drain_deadline_unix_s=deadline_unix_s)
    tick(fleet)
    assert (request.replica is not replica) is moved
    assert request.resumes == int(moved)


@pytest.mark.parametrize(
    ("still_s", "requests", "connected", "cut"),
    [(5.0, 1, True, False), (5.001, 1, True, True), (5.001, 0, True, False), (5.001, 1, False, False)],
)
def test_a_replica_hangs_when_it_has_requests_and_made_no_step_for_longer_than_hang_s(
    still_s: float, requests: int, connected: bool, cut: bool
) -> None:
    fleet = CoreFleet(replicas=1, resume={"hang_s": 5})
    for _ in range(requests):
        fleet.submit()
    replica = fleet.replicas[0]
    replica.connected = connected
    tick(fleet, still_s)
    told = ["the engine of replica m-0 hangs: no step for 5.0 s"] if cut else []
    assert fleet.link(replica).cuts == told
    assert replica.circuit.state is (CircuitState.OPEN if cut else CircuitState.CLOSED)


def test_a_hung_replica_whose_session_is_being_cut_is_left_alone() -> None:
    fleet = CoreFleet(replicas=1, resume={"hang_s": 5})
    fleet.submit()
    replica = fleet.replicas[0]
    replica.link = None
    tick(fleet, 6)
    assert replica.circuit.state is CircuitState.CLOSED


@pytest.mark.parametrize(
    ("connected", "after_s", "probes", "state"),
    [
        (True, 1.999, 0, CircuitState.OPEN),
        (True, 2.0, 1, CircuitState.HALF_OPEN),
        (False, 2.0, 0, CircuitState.OPEN),
    ],
)
def test_an_open_circuit_is_probed_once_its_pause_is_over_and_its_session_stands(
    connected: bool, after_s: float, probes: int, state: CircuitState
) -> None:
    fleet = CoreFleet(replicas=1, breaker={"failures": 1, "open_s": 2.0})
    replica = fleet.replicas[0]
    replica.circuit.failed(fleet.now)
    replica.connected = connected
    tick(fleet, after_s)
    assert (fleet.link(replica).probes, replica.circuit.state) == (probes, state)


def test_a_replica_without_a_link_is_not_probed() -> None:
    fleet = CoreFleet(replicas=1, breaker={"failures": 1, "open_s": 2.0})
    replica = fleet.replicas[0]
    replica.circuit.failed(fleet.now)
    replica.link = None
    tick(fleet, 3)
    assert replica.circuit.state is CircuitState.OPEN


def test_a_replica_is_open_again_in_the_tick_in_which_its_ejection_is_over() -> None:
    fleet = CoreFleet(replicas=1)
    replica = fleet.replicas[0]
    replica.ejected_until_s = fleet.now + 1
    tick(fleet)
    assert fleet.pool.open == []
    tick(fleet, 1)
    assert fleet.pool.open == [replica]


def test_a_tick_sums_up_what_a_model_s_replicas_were_measured_at() -> None:
    fleet = CoreFleet(replicas=2)
    for replica in fleet.replicas:
        replica.capacity.measured, replica.capacity.decode_tokens_per_s = True, 50.0
    tick(fleet)
    assert fleet.pool.measured_tokens_per_s == 100.0


@pytest.mark.parametrize(("after_s", "late"), [(4.999, False), (5.0, True), (7.25, True)])
def test_a_request_ends_with_its_deadline_and_the_next_one_takes_its_place(after_s: float, late: bool) -> None:
    fleet = CoreFleet(replicas=1, max_running=1, admission={"replica_slack": 1.0})
    request = fleet.submit(timeout_s=5.0)
    waiting = fleet.submit()
    tick(fleet, after_s)
    if late:
        assert error_of(fleet, request) == (4, f"not done after {after_s:.3f} s, its deadline")
    else:
        assert fleet.end(request) is None
    assert (request.state is RequestState.FINISHED) is late
    assert waiting.state is (RequestState.RUNNING if late else RequestState.QUEUED)


@pytest.mark.parametrize(
    ("serving", "waited_s", "ends"),
    [(True, 20.0, False), (True, 20.001, True), (False, 7.0, False), (False, 7.001, True)],
)
def test_a_new_request_waits_max_queue_s_where_a_replica_serves_and_wait_s_where_none_does(
    serving: bool, waited_s: float, ends: bool
) -> None:
    settings = {"admission": {"replica_slack": 1.0, "max_queue_s": 20.0}, "resume": {"wait_s": 7.0, "hang_s": 1000}}
    fleet = CoreFleet(replicas=2, max_running=1, **settings)
    for _ in range(2):
        fleet.tokens(fleet.submit(), 1)
    waiting = fleet.submit()
    assert waiting.state is RequestState.QUEUED
    fleet.replicas[0].connected = False
    fleet.replicas[1].connected = serving
    tick(fleet, waited_s)
    assert (waiting.state is RequestState.FINISHED) is ends
    if ends:
        text = f"waited {waited_s:.1f} s for a replica of 'm': no replica had room"
        assert error_of(fleet, waiting) == (14, text)


@pytest.mark.parametrize(("waited_s", "ends"), [(50.0, False), (50.001, True)])
def test_where_asking_makes_a_replica_start_a_request_is_taken_on_and_waits_hold_s(waited_s: float, ends: bool) -> None:
    fleet = CoreFleet(replicas=0, admission={"max_queue_s": 20.0}, resume={"wait_s": 7.0})
    fleet.pool.hold_s = 50.0
    waiting = fleet.submit()
    tick(fleet, waited_s)
    assert (waiting.state is RequestState.FINISHED) is ends


def test_a_lost_request_waits_no_longer_for_that_while_another_replica_serves() -> None:
    fleet = CoreFleet(
        replicas=2, max_running=1, admission={"replica_slack": 1.0}, resume={"wait_s": 7.0, "hang_s": 1000}
    )
    fleet.pool.hold_s = 50.0
    requests = [fleet.submit(), fleet.submit()]
    for request in requests:
        fleet.tokens(request, 1)
    fleet.lose(fleet.replica_of(requests[0]))
    assert requests[0].state is RequestState.RESUMING
    tick(fleet, 7.001)
    assert requests[0].state is RequestState.FINISHED


@pytest.mark.parametrize(("waited_s", "ends"), [(7.0, False), (7.001, True)])
def test_a_lost_request_waits_wait_s_from_its_loss_on_and_is_told_what_blocks(waited_s: float, ends: bool) -> None:
    fleet = CoreFleet(replicas=1, admission={"max_queue_s": 1000.0}, resume={"wait_s": 7.0})
    request = fleet.submit()
    fleet.tokens(request, 1)
    fleet.now += 3
    fleet.lose(fleet.replicas[0])
    fleet.pool.blocked = "1 device is missing"
    tick(fleet, waited_s)
    assert (request.state is RequestState.FINISHED) is ends
    if ends:
        assert error_of(fleet, request) == (14, "waited 7.0 s for a replica of 'm': 1 device is missing")


def test_a_lost_request_waits_no_longer_for_a_replica_that_serves_others() -> None:
    fleet = CoreFleet(replicas=2, max_running=1, admission={"max_queue_s": 1000.0, "replica_slack": 1.0})
    requests = [fleet.submit(), fleet.submit()]
    for request in requests:
        fleet.tokens(request, 1)
    fleet.lose(fleet.replica_of(requests[0]))
    tick(fleet, 29.9)
    assert requests[0].state is RequestState.RESUMING
    fleet.replicas[1].alive_s = fleet.now + 30
    tick(fleet, 30.1)
    assert requests[0].state is RequestState.FINISHED


def test_a_suspect_that_nobody_could_try_is_told_which_replica_was_lost_and_how_long_it_waited() -> None:
    fleet = CoreFleet(replicas=1, resume={"wait_s": 7.0})
    request = fleet.submit()
    fleet.now += 2
    fleet.lose(fleet.replicas[0])
    tick(fleet, 7.5)
    assert error_of(fleet, request) == (
        14,
        "replica m-0 was lost before this request's first token, and for 7.5 s no replica of 'm' could try it where "
        "it alone is to blame",
    )


def test_waits_of_one_model_are_ended_though_another_one_has_none() -> None:
    fleet = CoreFleet(replicas=0, resume={"wait_s": 7.0})
    fleet.pool.wanted = 1
    other = fleet.state.fleet.add_pool("n", fleet.state.policy_of(""))
    fleet.state.fleet.pools = {"n": other, "m": fleet.pool}
    request = fleet.submit()
    tick(fleet, 8)
    assert error_of(fleet, request)[0] == 14


@pytest.mark.parametrize(("after_s", "cut"), [(119.9, False), (120.0, False), (120.1, True)])
def test_a_worker_is_cut_off_that_does_not_confirm_an_end_for_two_minutes(after_s: float, cut: bool) -> None:
    fleet = CoreFleet(replicas=2)
    request = fleet.submit()
    replica = fleet.replica_of(request)
    fleet.cancel(request)
    upkeep.slow_tick(fleet.state, fleet.now + after_s)
    told = ["it did not confirm the end of a cancelled stream within 120 s"]
    assert [fleet.link(one).cuts for one in fleet.replicas] == [
        told if cut and one is replica else [] for one in fleet.replicas
    ]


def test_a_worker_without_a_session_is_not_cut_off() -> None:
    fleet = CoreFleet(replicas=1)
    fleet.cancel(fleet.submit())
    fleet.replicas[0].link = None
    upkeep.slow_tick(fleet.state, fleet.now + 200)
    assert fleet.replicas[0].connected


def test_a_slow_replica_is_out_for_the_longest_pause_and_is_judged_anew_afterwards() -> None:
    fleet = CoreFleet(replicas=5, breaker={"max_open_s": 12.0})
    for i, replica in enumerate(fleet.replicas):
        replica.step_s, replica.steps = (0.02 if i else 0.2), 100
    upkeep.slow_tick(fleet.state, fleet.now)
    slow = fleet.replicas[0]
    assert (slow.ejected_until_s, slow.step_s, slow.steps) == (fleet.now + 12.0, 0.0, 0)
    assert slow not in fleet.pool.open
    assert all((one.ejected_until_s, one.step_s, one.steps) == (0.0, 0.02, 100) for one in fleet.replicas[1:])


def test_held_tokens_are_due_when_their_delay_is_over_and_again_after_it() -> None:
    fleet = CoreFleet(replicas=1)
    request = fleet.submit(delivery=tokens_pb2.DELIVERY_COALESCE, max_delay_ms=100)
    fleet.tokens(request, 1)
    for token in (2, 3):
        fleet.tokens(request, token)
        fleet.now += 0.0999
        upkeep.flush_due(fleet.state, fleet.now)
        assert fleet.received(request) == list(range(1, token))
        fleet.now += 0.0002
        upkeep.flush_due(fleet.state, fleet.now)
        assert fleet.received(request) == list(range(1, token + 1))
        assert not request.hold_due
