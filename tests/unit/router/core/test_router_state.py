"""What the router's state keeps by itself: places of sessions, refusals by model, and its retry budget."""

from __future__ import annotations

from megatoken.errors import UnavailableError
from megatoken.router.core.sink import SessionSink
from tests.support.router_core import CoreFleet


def test_sessions_get_the_first_free_place() -> None:
    state = CoreFleet(replicas=0).state
    state.sinks.clear()
    sinks = [SessionSink() for _ in range(3)]
    for sink in sinks:
        state.add_sink(sink)
    assert [sink.index for sink in sinks] == [0, 1, 2]
    state.remove_sink(sinks[1])
    assert (sinks[1].index, state.sinks) == (-1, [sinks[0], None, sinks[2]])
    later = [SessionSink(), SessionSink()]
    for sink in later:
        state.add_sink(sink)
    assert [sink.index for sink in later] == [1, 3]
    assert state.sinks == [sinks[0], later[0], sinks[2], later[1]]


def test_a_refusal_counts_for_its_model_and_for_nobody_where_there_is_none() -> None:
    fleet = CoreFleet(replicas=0)
    fleet.state.count_refusal("m", UnavailableError("no replica"))
    for _ in range(2):
        fleet.state.count_refusal("x", UnavailableError("no replica"))
    assert (fleet.pool.measures.refusals["no_replica"], fleet.state.nowhere.refusals["no_replica"]) == (1, 2)
    fleet.state.draining = True
    fleet.state.count_refusal("m", UnavailableError("it drains"))
    assert fleet.pool.measures.refusals["draining"] == 1


def test_a_policy_that_nobody_names_is_the_router_s() -> None:
    state = CoreFleet(replicas=0, policy="round_robin").state
    assert (state.policy_of("").name, state.policy_of("least_tokens").name) == ("round_robin", "least_tokens")


def test_a_new_state_has_counted_nothing() -> None:
    state = CoreFleet(replicas=0).state
    counts = (state.frames, state.live, state.resuming, state.held, state.live_bytes, state.ordinal)
    assert counts == (0, 0, 0, 0, 0, 0)
    assert (state.draining, state.membership_connected) == (False, False)
