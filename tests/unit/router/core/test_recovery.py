"""A replica is lost, or lets a request go: whether the request goes on, what it keeps, and what is counted."""

from __future__ import annotations

import pytest

from megatoken.router.core import recovery
from megatoken.router.core.lifecycle import RequestState
from megatoken.router.core.request import Request
from megatoken.router.fleet.circuit import CircuitState
from tests.support.router_core import ERROR, CoreFleet


def lose(fleet: CoreFleet, request: Request, *, known: bool = False, died: bool = False) -> None:
    recovery.lose(fleet.state, request, "it broke", fleet.now, known_to_worker=known, died=died)


def refusal_of(fleet: CoreFleet, request: Request) -> str:
    """What the request was told; empty while it goes on."""
    end = fleet.end(request)
    if end is None:
        return ""
    assert (end.reason, end.code) == (ERROR, 14)
    return end.message


def test_a_request_that_no_replica_has_is_not_lost() -> None:
    fleet = CoreFleet(replicas=0)
    fleet.pool.wanted = 1
    request = fleet.submit()
    lose(fleet, request)
    assert (request.state, request.tried) == (RequestState.QUEUED, [])


@pytest.mark.parametrize("known", [True, False])
def test_a_slot_that_the_worker_knows_is_cancelled_and_kept_and_another_is_free_at_once(known: bool) -> None:
    fleet = CoreFleet(replicas=1)
    request = fleet.submit()
    replica, slot = fleet.replica_of(request), request.slot
    replica.draining = True
    fleet.state.fleet.refresh(replica, fleet.now)
    fleet.tokens(request, 7, 8)
    fleet.now += 1
    lose(fleet, request, known=known)
    assert fleet.link(replica).cancelled == ([slot] if known else [])
    assert fleet.state.slots.taken == int(known)
    assert (request.slot, request.carried, request.tried) == (-1, bytes([7, 0, 0, 0, 8, 0, 0, 0]), [replica.index])
    assert (request.placed_s, replica.in_flight) == (fleet.now, 0)


def test_a_slot_of_a_replica_without_a_session_is_free_at_once() -> None:
    fleet = CoreFleet(replicas=1)
    request = fleet.submit()
    fleet.replicas[0].link = None
    fleet.replicas[0].draining = True
    fleet.state.fleet.refresh(fleet.replicas[0], fleet.now)
    lose(fleet, request, known=True)
    assert fleet.state.slots.taken == 0


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("tokens", [0, 2])
def test_a_move_with_tokens_is_a_resume_and_one_without_is_a_retry(tokens: int, known: bool) -> None:
    fleet = CoreFleet(replicas=3)
    request = fleet.submit()
    if tokens:
        fleet.tokens(request, *range(tokens))
    lose(fleet, request, known=known)
    moved = int(tokens > 0)
    measures = fleet.pool.measures
    assert (request.resumes, fleet.state.ledger.resumes, measures.retries) == (moved, moved, 1 - moved)
    assert measures.resumes == {"lost": moved * (not known), "drained": moved * known}
    lose(fleet, request, known=known)
    assert (request.resumes, fleet.state.ledger.resumes, measures.retries) == (2 * moved, 2 * moved, 2 - 2 * moved)


def test_a_replica_that_lost_a_request_twice_is_noted_once() -> None:
    fleet = CoreFleet(replicas=1)
    request = fleet.submit()
    for _ in range(3):
        fleet.tokens(request, 1)
        lose(fleet, request)
    assert request.tried == [0]


@pytest.mark.parametrize(
    ("most", "losses", "told"),
    [
        (0, 1, "it broke; moved 0 times already"),
        (2, 2, ""),
        (2, 3, "it broke; moved 2 times already"),
    ],
)
def test_a_request_moves_max_resumes_times(most: int, losses: int, told: str) -> None:
    fleet = CoreFleet(replicas=2, resume={"max_resumes": most})
    request = fleet.submit()
    for _ in range(losses):
        assert refusal_of(fleet, request) == ""
        fleet.tokens(request, 1)
        lose(fleet, request)
    assert refusal_of(fleet, request) == told


@pytest.mark.parametrize(("tokens", "told"), [(0, ""), (1, "it broke; resuming is off for this request")])
def test_without_resuming_a_request_moves_only_until_it_has_a_token(tokens: int, told: str) -> None:
    fleet = CoreFleet(replicas=2, resume={"enabled": False})
    request = fleet.submit()
    if tokens:
        fleet.tokens(request, 1)
    lose(fleet, request)
    assert refusal_of(fleet, request) == told


def test_a_refused_request_names_the_replica_that_it_was_on() -> None:
    fleet = CoreFleet(replicas=1, resume={"max_resumes": 0})
    request = fleet.submit()
    lose(fleet, request)
    end = fleet.end(request)
    assert end is not None
    assert (end.replica, end.resumes) == ("m-0", 0)


def test_moves_beyond_the_retry_budget_are_refused() -> None:
    fleet = CoreFleet(replicas=2, resume={"retry_budget_ratio": 0.0, "retry_budget_floor": 1})
    requests = [fleet.submit(), fleet.submit()]
    for request in requests:
        lose(fleet, request)
    told = [refusal_of(fleet, request) for request in requests]
    assert told == ["", "it broke; too many requests move already (retry budget)"]


@pytest.mark.parametrize(
    ("context", "made", "seeded", "told"),
    [
        (10, 6, False, ""),
        (10, 7, False, "it broke; no room is left in the context"),
        (10, 7, True, ""),
        (1, 1, False, "it broke; no room is left in the context"),
        (0, 7, False, ""),
    ],
)
def test_a_request_whose_tokens_fill_the_context_cannot_go_on_unless_it_is_made_again(
    context: int, made: int, seeded: bool, told: str
) -> None:
    fleet = CoreFleet(replicas=2)
    request = fleet.submit(prompt=(1, 2, 3), **({"seed": 1, "temperature": 1.0} if seeded else {}))
    fleet.tokens(request, *range(made))
    fleet.pool.max_model_len = context
    lose(fleet, request)
    assert refusal_of(fleet, request) == told


def test_a_context_that_no_replica_states_any_more_ends_nothing() -> None:
    fleet = CoreFleet(replicas=1)
    request = fleet.submit(prompt=(1, 2, 3))
    fleet.tokens(request, 1)
    fleet.pool.replicas.clear()
    fleet.pool.max_model_len = 2
    lose(fleet, request)
    assert refusal_of(fleet, request) == ""


@pytest.mark.parametrize(
    ("died", "tokens", "suspect"), [(True, 0, True), (True, 1, False), (False, 0, False), (False, 1, False)]
)
def test_a_request_is_suspect_when_its_replica_died_before_giving_it_a_token(
    died: bool, tokens: int, suspect: bool
) -> None:
    fleet = CoreFleet(replicas=1)
    request = fleet.submit()
    replica = fleet.replicas[0]
    replica.draining = True
    fleet.state.fleet.refresh(replica, fleet.now)
    if tokens:
        fleet.tokens(request, 1)
    lose(fleet, request, died=died)
    assert request.suspected_of == (replica.name if suspect else "")
    assert fleet.pool.queue.suspects == int(suspect)
    assert (fleet.pool.queue.peek() is request) is not suspect


def test_a_suspect_whose_lone_try_ends_without_a_death_stays_suspect_and_is_not_guilty() -> None:
    fleet = CoreFleet(replicas=3)
    request = fleet.submit()
    first = fleet.replica_of(request)
    fleet.lose(first)
    second = fleet.replica_of(request)
    assert second.trial is request
    lose(fleet, request, known=True)
    assert (refusal_of(fleet, request), request.suspected_of) == ("", first.name)
    third = fleet.replica_of(request)
    lose(fleet, request, died=True)
    assert refusal_of(fleet, request) == (
        f"it broke; replicas {first.name} and {third.name} were both lost before this request's first token, the "
        f"second while it alone had none there: it is not tried again"
    )


def test_a_lost_replica_keeps_nothing_of_its_session() -> None:
    fleet = CoreFleet(replicas=1)
    replica = fleet.replicas[0]
    replica.load_totals, replica.others, replica.ward, replica.cleared = (1, 1, 1, 1), 3, True, True
    fleet.lose(replica)
    assert (replica.connected, replica.link, replica.load_totals, replica.others) == (False, None, None, 0)
    assert (replica.ward, replica.cleared, fleet.pool.open) == (False, False, [])


@pytest.mark.parametrize("had", ["nothing", "an orphan", "a request"])
@pytest.mark.parametrize("state", list(CircuitState))
def test_a_lost_session_counts_against_a_replica_that_had_requests_or_was_being_probed(
    had: str, state: CircuitState
) -> None:
    fleet = CoreFleet(replicas=1)
    replica = fleet.replicas[0]
    if had != "nothing":
        request = fleet.submit()
        if had == "an orphan":
            fleet.cancel(request)
    replica.circuit.state = state
    fleet.lose(replica)
    counted = had == "a request" or state is CircuitState.HALF_OPEN
    assert replica.circuit.failures == int(counted)
    assert replica.circuit.state is (CircuitState.OPEN if state is CircuitState.HALF_OPEN else state)
    assert fleet.state.slots.taken == 0


@pytest.mark.parametrize(
    ("gone", "draining", "suspect"),
    [(False, False, True), (True, False, True), (False, True, True), (True, True, False)],
)
def test_the_end_of_a_replica_that_was_drained_and_removed_is_no_death(
    gone: bool, draining: bool, suspect: bool
) -> None:
    fleet = CoreFleet(replicas=1)
    request = fleet.submit()
    replica = fleet.replicas[0]
    replica.gone, replica.draining = gone, draining
    fleet.lose(replica)
    assert request.suspected_of == ("m-0" if suspect else "")
    assert (fleet.state.fleet.replicas == [None]) is gone


def test_a_lost_replica_s_streams_count_as_lost_and_not_as_drained() -> None:
    fleet = CoreFleet(replicas=2)
    request = fleet.submit()
    fleet.tokens(request, 1)
    fleet.lose(fleet.replica_of(request))
    assert fleet.pool.measures.resumes == {"lost": 1, "drained": 0}


def test_a_session_that_is_given_up_is_cut_and_lost() -> None:
    fleet = CoreFleet(replicas=1)
    replica, link = fleet.replicas[0], fleet.link(fleet.replicas[0])
    recovery.give_up(fleet.state, replica, "a frame is missing", fleet.now)
    assert (link.cuts, replica.connected) == (["a frame is missing"], False)
    recovery.give_up(fleet.state, replica, "again", fleet.now)
    assert link.cuts == ["a frame is missing"]


@pytest.mark.parametrize("state", [CircuitState.CLOSED, CircuitState.OPEN])
@pytest.mark.parametrize("well", [True, False])
def test_a_probe_s_verdict_counts_only_while_one_is_awaited(state: CircuitState, well: bool) -> None:
    fleet = CoreFleet(replicas=1)
    circuit = fleet.replicas[0].circuit
    circuit.state, circuit.failures = state, 3
    recovery.probed(fleet.state, fleet.replicas[0], fleet.now, well=well)
    assert (circuit.state, circuit.failures) == (state, 3)


def test_a_new_session_begins_alive_and_without_a_step_count() -> None:
    fleet = CoreFleet(replicas=1)
    replica = fleet.replicas[0]
    fleet.lose(replica)
    replica.engine_steps = 7
    fleet.now += 50
    fleet.connect(replica)
    assert (replica.connected, replica.alive_s, replica.engine_steps) == (True, fleet.now, -1)
    assert fleet.pool.open == [replica]


def test_all_that_a_draining_replica_has_moves_and_orphans_stay() -> None:
    fleet = CoreFleet(replicas=2, max_running=8)
    requests = [fleet.submit() for _ in range(6)]
    replica = fleet.replicas[0]
    orphan, *here = [request for request in requests if request.replica is replica]
    fleet.cancel(orphan)
    replica.draining = True
    fleet.state.fleet.refresh(replica, fleet.now)
    recovery.move_all(fleet.state, replica, "drained", fleet.now)
    assert (replica.in_flight, replica.connected) == (0, True)
    assert [request.replica for request in here] == [fleet.replicas[1]] * len(here)
    assert len(fleet.state.slots.of_replica(0)) == 1 + len(here)
