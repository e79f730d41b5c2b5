"""A lost, hung or drained replica: its requests go on elsewhere, and the client sees one stream."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatoken.router.core import recovery, upkeep
from megatoken.router.core.lifecycle import RequestState
from megatoken.router.core.request import Request
from megatoken.router.fleet.circuit import CircuitState
from megatoken.router.fleet.fleet import Endpoint
from megatoken.router.intake.intake import on_frames
from megatoken.v1 import tokens_pb2
from tests.support.router_core import CANCELLED, ERROR, LENGTH, CoreFleet


def test_a_lost_replica_s_requests_go_on_from_prompt_and_tokens_so_far() -> None:
    fleet = CoreFleet()
    request = fleet.submit(prompt=(1, 2), max_tokens=10, min_tokens=4)
    fleet.tokens(request, 11, 12, 13)
    lost = fleet.replica_of(request)
    fleet.lose(lost)
    assert fleet.replica_of(request) is not lost
    again = fleet.started(request)
    assert list(again.prompt) == [1, 2, 11, 12, 13]
    assert (again.sampling.max_tokens, again.sampling.min_tokens, again.resumed_tokens) == (7, 1, 3)
    fleet.tokens(request, 14)
    fleet.tokens(request, 15)
    fleet.finish(request, LENGTH, prompt_tokens=5, generated_tokens=2)
    assert fleet.received(request) == [11, 12, 13, 14, 15]
    end = fleet.end(request)
    assert end is not None
    assert (end.prompt_tokens, end.generated_tokens, end.resumes, end.resume_note) == (2, 5, 1, "")
    fleet.check_idle()


def test_a_request_lost_twice_keeps_everything() -> None:
    fleet = CoreFleet(replicas=3)
    request = fleet.submit(prompt=(1,), max_tokens=10)
    expected = []
    for turn in range(3):
        fleet.tokens(request, 10 * turn, 10 * turn + 1)
        expected += [10 * turn, 10 * turn + 1]
        if turn < 2:
            fleet.lose(fleet.replica_of(request))
    assert list(fleet.started(request).prompt) == [1, *expected[:4]]
    fleet.finish(request)
    assert fleet.received(request) == expected
    end = fleet.end(request)
    assert end is not None
    assert (end.resumes, end.generated_tokens) == (2, 6)


def test_a_request_without_a_token_is_simply_sent_again() -> None:
    fleet = CoreFleet()
    request = fleet.submit(resume=tokens_pb2.RESUME_OFF)
    fleet.lose(fleet.replica_of(request))
    assert request.state is RequestState.RUNNING
    fleet.tokens(request, 5)
    fleet.finish(request)
    end = fleet.end(request)
    assert end is not None
    assert end.resumes == 0


def test_with_resume_off_a_started_stream_ends_with_unavailable() -> None:
    fleet = CoreFleet()
    request = fleet.submit(resume=tokens_pb2.RESUME_OFF)
    fleet.tokens(request, 5)
    fleet.lose(fleet.replica_of(request))
    end = fleet.end(request)
    assert end is not None
    assert (end.reason, end.code, end.generated_tokens) == (ERROR, 14, 1)
    assert "resuming is off" in end.message
    fleet.check_idle()


def test_seeded_sampling_is_replayed_and_the_client_sees_nothing_twice() -> None:
    fleet = CoreFleet()
    request = fleet.submit(prompt=(1, 2), max_tokens=10, seed=5, temperature=1.0)
    first = fleet.started(request)
    fleet.tokens(request, 11, 12, 13)
    fleet.lose(fleet.replica_of(request))
    assert fleet.started(request) == first  # the same request, seed included
    fleet.tokens(request, 11)
    fleet.tokens(request, 12)
    assert fleet.received(request) == [11, 12, 13]
    fleet.tokens(request, 13, 14)
    fleet.tokens(request, 15)
    fleet.finish(request)
    assert fleet.received(request) == [11, 12, 13, 14, 15]
    end = fleet.end(request)
    assert end is not None
    assert (end.generated_tokens, end.resumes, end.resume_note) == (5, 1, "")
    fleet.check_idle()


@pytest.mark.parametrize(
    "sampling",
    [
        {"presence_penalty": 0.5},
        {"structured_outputs": tokens_pb2.StructuredOutputs(json_object=True), "temperature": 1.0},
        {"seed": 5},  # greedy: the seed decides nothing
    ],
)
def test_what_depends_on_the_tokens_alone_goes_on_from_them(sampling: dict[str, object]) -> None:
    fleet = CoreFleet()
    request = fleet.submit(prompt=(1, 2), max_tokens=10, **sampling)
    fleet.tokens(request, 11, 12)
    fleet.lose(fleet.replica_of(request))
    again = fleet.started(request)
    assert (list(again.prompt), again.resumed_tokens) == ([1, 2, 11, 12], 2)
    fleet.finish(request, resume_note="a bad word of several tokens may span the resume")
    end = fleet.end(request)
    assert end is not None
    assert end.resume_note == "a bad word of several tokens may span the resume"


def rows(slot: int, *tokens: int) -> tokens_pb2.Detail:
    logprobs = tokens_pb2.Logprobs(width=1, token=tokens, logprob=[-0.5] * len(tokens), rank=[1] * len(tokens))
    return tokens_pb2.Detail(stream=slot, logprobs=logprobs)


def details_of(fleet: CoreFleet, request: Request) -> list[int]:
    """The tokens whose log probabilities the client got for it."""
    fleet.collect()
    found = [detail for frame in fleet.frames for detail in frame.detail if detail.stream == request.stream]
    return [token for detail in found for token in detail.logprobs.token]


def test_log_probabilities_of_a_replay_come_once_beside_another_stream_of_the_session() -> None:
    fleet = CoreFleet(max_running=8)
    replayed = fleet.submit(prompt=(1, 2), max_tokens=10, seed=5, temperature=1.0, logprobs=1)
    lost = fleet.replica_of(replayed)
    fleet.frame(lost, stream=[replayed.slot], count=[3], token=[11, 12, 13], detail=[rows(replayed.slot, 11, 12, 13)])
    fleet.lose(lost)
    other = fleet.submit(logprobs=1)
    there = fleet.replica_of(replayed)
    fleet.frame(
        there,
        stream=[other.slot, replayed.slot],
        count=[1, 4],
        token=[5, 11, 12, 13, 14],
        detail=[rows(other.slot, 5), rows(replayed.slot, 11, 12, 13, 14)],
    )
    assert (fleet.received(replayed), fleet.received(other)) == ([11, 12, 13, 14], [5])
    assert (details_of(fleet, replayed), details_of(fleet, other)) == ([11, 12, 13, 14], [5])


def test_held_log_probabilities_wait_for_their_tokens_beside_another_stream_of_the_session() -> None:
    fleet = CoreFleet(replicas=1)
    held = fleet.submit(delivery=tokens_pb2.DELIVERY_FIRST_THEN_ALL)
    other = fleet.submit()
    only = fleet.replicas[0]
    for token in (1, 2):
        fleet.frame(only, stream=[held.slot, other.slot], token=[token, 7], detail=[rows(held.slot, token)])
    assert (fleet.received(held), details_of(fleet, held)) == ([1], [1])
    fleet.finish(held)
    assert (fleet.received(held), details_of(fleet, held)) == ([1, 2], [1, 2])


def test_details_without_a_token_are_passed_on() -> None:
    fleet = CoreFleet()
    request = fleet.submit(logprobs=1)
    fleet.frame(fleet.replica_of(request), detail=[rows(request.slot, 4)])
    fleet.tokens(request, 4)
    assert (fleet.received(request), details_of(fleet, request)) == ([4], [4])


def test_a_replay_that_differs_goes_on_from_what_the_client_has_and_says_so() -> None:
    fleet = CoreFleet(replicas=3)
    request = fleet.submit(prompt=(1,), seed=5, temperature=1.0, max_tokens=9)
    fleet.tokens(request, 11, 12)
    fleet.lose(fleet.replica_of(request))
    fleet.tokens(request, 11)
    fleet.tokens(request, 99, 98, 97)
    again = fleet.started(request)
    assert (list(again.prompt), again.sampling.max_tokens) == ([1, 11, 12], 7)
    fleet.tokens(request, 13)
    fleet.finish(request)
    end = fleet.end(request)
    assert end is not None
    assert "restarted" in end.resume_note
    assert fleet.received(request) == [11, 12, 13]
    fleet.check_idle()


def test_a_replica_lost_in_the_middle_of_a_replay_loses_nothing() -> None:
    fleet = CoreFleet(replicas=3)
    request = fleet.submit(seed=5, temperature=1.0)
    fleet.tokens(request, 11, 12, 13)
    fleet.lose(fleet.replica_of(request))
    fleet.tokens(request, 11)
    fleet.lose(fleet.replica_of(request))
    fleet.tokens(request, 11, 12, 13, 14)
    fleet.finish(request)
    assert fleet.received(request) == [11, 12, 13, 14]


def test_a_worker_s_own_fault_moves_the_request() -> None:
    fleet = CoreFleet()
    request = fleet.submit(max_tokens=9)
    fleet.tokens(request, 1)
    before = fleet.replica_of(request)
    fleet.finish(request, ERROR, code=14, message="the engine is gone")
    assert request.state is RequestState.RUNNING
    assert fleet.replica_of(request) is not before
    assert before.circuit.failures == 1


def test_with_no_other_replica_it_waits_and_then_says_so() -> None:
    fleet = CoreFleet(replicas=1, resume={"wait_s": 10})
    request = fleet.submit()
    fleet.tokens(request, 1)
    replica = fleet.replica_of(request)
    fleet.lose(replica)
    assert request.state is RequestState.RESUMING
    fleet.tick(5)
    assert fleet.end(request) is None
    fleet.connect(replica)
    assert request.state is RequestState.RUNNING
    fleet.tokens(request, 2)
    fleet.lose(replica)
    fleet.tick(11)
    end = fleet.end(request)
    assert end is not None
    assert (end.reason, end.code) == (ERROR, 14)
    assert "waited" in end.message
    fleet.check_idle()


def test_a_replay_passes_on_every_new_row_however_many_details_its_last_frame_has() -> None:
    fleet = CoreFleet()
    request = fleet.submit(max_tokens=9, seed=7, temperature=1.0, logprobs=0)

    def row(value: int) -> tokens_pb2.Detail:
        return tokens_pb2.Detail(
            stream=request.slot, logprobs=tokens_pb2.Logprobs(width=1, token=[value], logprob=[0.0], rank=[value])
        )

    fleet.frame(fleet.replica_of(request), stream=[request.slot], token=[1], detail=[row(1)])
    fleet.lose(fleet.replica_of(request))
    slot = request.slot
    details = [row(1), row(2), row(3)]
    fleet.frame(fleet.replica_of(request), stream=[slot], count=[3], token=[1, 2, 3], detail=details)
    assert fleet.received(request) == [1, 2, 3]
    rows = [rank for frame in fleet.frames for detail in frame.detail for rank in detail.logprobs.rank]
    assert rows == [1, 2, 3]


def test_rows_of_the_prompt_that_came_before_a_death_are_not_sent_twice() -> None:
    fleet = CoreFleet()
    request = fleet.submit(max_tokens=9, prompt_logprobs=0)

    def send(*ranks: int) -> None:
        rows = tokens_pb2.Logprobs(width=1, token=ranks, logprob=[0.0] * len(ranks), rank=ranks)
        detail = tokens_pb2.Detail(stream=request.slot, prompt_logprobs=rows)
        fleet.frame(fleet.replica_of(request), detail=[detail])

    send(1, 2)
    fleet.lose(fleet.replica_of(request))
    send(1)
    send(2, 3)
    send(4)
    fleet.tokens(request, 7)
    assert fleet.received(request) == [7]
    rows = [rank for frame in fleet.frames for detail in frame.detail for rank in detail.prompt_logprobs.rank]
    assert rows == [1, 2, 3, 4]


def test_a_hung_replica_is_cut_off() -> None:
    fleet = CoreFleet(replicas=2, resume={"hang_s": 5})
    request = fleet.submit()
    replica = fleet.replica_of(request)
    fleet.tick(4)
    assert not fleet.link(replica).cuts
    fleet.tick(2)
    assert "no step for" in fleet.link(replica).cuts[0]


def test_a_long_prefill_that_makes_steps_is_no_hang() -> None:
    fleet = CoreFleet(replicas=2, resume={"hang_s": 5})
    request = fleet.submit()
    replica = fleet.replica_of(request)
    for steps in range(90):
        fleet.frame(replica, load=tokens_pb2.Load(running=1, steps=steps))
        fleet.tick(1)
    assert fleet.replica_of(request) is replica
    assert not fleet.link(replica).cuts


@pytest.mark.parametrize("sent", [{"load": tokens_pb2.Load(running=1, steps=7)}, "ends", None])
def test_a_frozen_engine_hangs_whatever_its_worker_still_says(sent: dict[str, object] | str | None) -> None:
    fleet = CoreFleet(replicas=1, resume={"hang_s": 5})
    request = fleet.submit()
    replica = fleet.replica_of(request)
    others = [fleet.submit() for _ in range(3)]
    fleet.frame(replica, load=tokens_pb2.Load(running=1, steps=7))
    for turn in range(6):
        if sent == "ends" and turn % 2 == 0:  # the worker confirms cancels by itself
            slot = others[turn // 2].slot
            fleet.cancel(others[turn // 2])
            fleet.frame(replica, finish=[tokens_pb2.Finish(stream=slot, reason=CANCELLED)])
        elif isinstance(sent, dict):
            fleet.frame(replica, **sent)
        fleet.tick(1)
    assert "no step for" in fleet.link(replica).cuts[0]
    assert replica.circuit.state is CircuitState.OPEN


def test_a_new_session_s_first_report_is_no_sign_of_life() -> None:
    fleet = CoreFleet(replicas=1, resume={"hang_s": 5})
    fleet.submit()
    replica = fleet.replicas[0]
    fleet.tick(4)
    fleet.frame(replica, load=tokens_pb2.Load(running=1, steps=7))
    fleet.tick(2)
    assert fleet.link(replica).cuts


def test_an_idle_replica_is_never_called_hung() -> None:
    fleet = CoreFleet(replicas=1, resume={"hang_s": 5})
    fleet.tick(100)
    fleet.submit()
    fleet.tick(1)
    assert not fleet.link(fleet.replicas[0]).cuts


def test_a_drain_deadline_moves_what_is_left_and_late_tokens_are_dropped() -> None:
    fleet = CoreFleet()
    request = fleet.submit(prompt=(1,), max_tokens=9)
    fleet.tokens(request, 4)
    drained, slot = fleet.replica_of(request), request.slot
    drained.draining = True
    drained.member = replace(drained.member, draining=True, drain_deadline_unix_s=1e9 + fleet.now + 3)
    fleet.tick(1)
    assert fleet.replica_of(request) is drained
    fleet.tick(3)
    assert fleet.replica_of(request) is not drained
    assert fleet.link(drained).cancelled == [slot]
    fleet.frame(drained, stream=[slot], token=[99])
    fleet.tokens(request, 5)
    fleet.finish(request)
    assert fleet.received(request) == [4, 5]
    fleet.frame(drained, finish=[tokens_pb2.Finish(stream=slot, reason=3)])
    assert fleet.state.slots.taken == 0


def test_retries_are_bounded_by_the_budget() -> None:
    fleet = CoreFleet(replicas=2, max_running=64, resume={"retry_budget_ratio": 0.0, "retry_budget_floor": 3})
    requests = [fleet.submit() for _ in range(20)]
    had = fleet.replicas[0].in_flight
    fleet.lose(fleet.replicas[0])
    ended = [r for r in requests if r.state is RequestState.FINISHED]
    assert had > 3
    assert len(ended) == had - 3
    assert "retry budget" in fleet.end(ended[0]).message  # type: ignore[union-attr]


def test_a_request_whose_replicas_die_after_a_token_moves_only_so_often() -> None:
    fleet = CoreFleet(replicas=8, resume={"max_resumes": 2})
    request = fleet.submit()
    losses = 0
    while request.state is RequestState.RUNNING:
        fleet.tokens(request, losses)
        fleet.lose(fleet.replica_of(request))
        losses += 1
    assert losses == 3
    assert request.state is RequestState.FINISHED


def test_a_request_that_kills_every_replica_costs_two_and_is_told_so() -> None:
    fleet = CoreFleet(replicas=8)
    request = fleet.submit()
    first = fleet.replica_of(request)
    fleet.lose(first)
    second = fleet.replica_of(request)
    for _ in range(40):  # nobody joins it
        fleet.submit()
    assert second.in_flight == 1
    fleet.lose(second)
    end = fleet.end(request)
    assert end is not None
    assert (end.reason, end.code) == (ERROR, 14)
    assert f"replicas {first.name} and {second.name} were both lost" in end.message
    assert not any(replica.ward for replica in fleet.replicas if replica.connected)


def test_a_suspect_waits_until_all_others_have_a_token_and_is_cleared_by_its_own() -> None:
    fleet = CoreFleet(replicas=2, resume={"wait_s": 10})
    busy = [fleet.submit() for _ in range(4)]
    lost, kept = fleet.replicas
    company = [request for request in busy if request.replica is kept]
    suspects = [request for request in busy if request.replica is lost]
    fleet.tokens(company[0], 1)
    fleet.lose(lost)
    assert {request.state for request in suspects} == {RequestState.RESUMING}
    fleet.tick(3)
    assert {request.state for request in suspects} == {RequestState.RESUMING}
    fleet.tokens(company[1], 1)
    assert [request.state for request in suspects] == [RequestState.RUNNING, RequestState.RESUMING]
    for request in company:
        fleet.finish(request)
    assert [request.state for request in suspects] == [RequestState.RUNNING, RequestState.RESUMING]
    later = fleet.submit()
    assert later.state is RequestState.QUEUED
    for request in suspects:
        fleet.tokens(request, 1)
    assert [request.state for request in suspects] == [RequestState.RUNNING, RequestState.RUNNING]
    assert later.state is RequestState.RUNNING
    for request in [*suspects, later]:
        fleet.finish(request)
    fleet.check_idle()


def test_a_suspect_waits_for_no_answer_to_end_and_a_second_death_is_its_own() -> None:
    fleet = CoreFleet(replicas=3, max_running=4, resume={"wait_s": 10})
    busy = [fleet.submit(max_tokens=1000) for _ in range(6)]
    suspect = busy[0]
    first = fleet.replica_of(suspect)
    for request in busy[1:]:
        fleet.tokens(request, 1)
    fleet.lose(first)
    assert suspect.state is RequestState.RESUMING, "an idle one is waited for at first"
    fleet.tick(3)
    second = fleet.replica_of(suspect)
    company = [request for request in busy[1:] if request.replica is second]
    assert company, "every other replica has streams that go on for long"
    fleet.lose(second)
    end = fleet.end(suspect)
    assert end is not None
    assert f"replicas {first.name} and {second.name} were both lost" in end.message
    for request in busy[1:]:
        assert (request.state, request.suspected_of) == (RequestState.RUNNING, "")
        fleet.tokens(request, 2)
        fleet.finish(request)
        assert fleet.received(request) == [1, 2]
    fleet.check_idle()


def test_a_suspect_waits_half_its_time_for_other_routers_requests_to_end() -> None:
    fleet = CoreFleet(replicas=2, resume={"wait_s": 10})
    suspect = fleet.submit()
    first = fleet.replica_of(suspect)
    other = next(replica for replica in fleet.replicas if replica is not first)
    fleet.frame(other, load=tokens_pb2.Load(running=2, steps=1))
    fleet.lose(first)
    fleet.tick(4)
    assert suspect.state is RequestState.RESUMING
    fleet.tick(2)
    assert fleet.replica_of(suspect) is other
    assert other.trial is suspect


def test_a_suspect_that_finds_no_replica_to_be_tried_on_ends_and_says_why() -> None:
    fleet = CoreFleet(replicas=2, resume={"wait_s": 10})
    busy = [fleet.submit() for _ in range(4)]
    lost, kept = fleet.replicas
    suspect = next(request for request in busy if request.replica is lost)
    fleet.lose(lost)
    fleet.tick(11)
    end = fleet.end(suspect)
    assert end is not None
    assert "could try it where it alone is to blame" in end.message
    fleet.submit()
    fleet.tick()
    assert not kept.ward


def test_a_drained_replica_s_end_makes_nobody_suspect() -> None:
    fleet = CoreFleet(replicas=2)
    request = fleet.submit()
    replica = fleet.replica_of(request)
    replica.draining = True
    fleet.state.fleet.remove(replica)
    fleet.lose(replica)
    assert request.suspected_of == ""
    assert request.state is RequestState.RUNNING


def test_failures_in_a_row_open_the_circuit_and_a_probe_that_is_no_request_closes_it() -> None:
    fleet = CoreFleet(replicas=1, breaker={"failures": 2, "open_s": 1.0})
    replica, link = fleet.replicas[0], fleet.link(fleet.replicas[0])
    request = fleet.submit()
    for _ in range(2):
        fleet.finish(request, ERROR, code=13, message="boom")  # sent again, as it had no token
    assert replica.circuit.state is CircuitState.OPEN
    assert request.state is RequestState.RESUMING
    fleet.cancel(request)
    fleet.tick(0.5)
    waiting = [fleet.submit(), fleet.submit()]
    assert link.probes == 0
    for _ in range(3):
        fleet.tick(1)
        assert (link.probes, replica.circuit.state) == (1, CircuitState.HALF_OPEN)
    assert {r.state for r in waiting} == {RequestState.QUEUED}
    recovery.probed(fleet.state, replica, fleet.now, well=False)
    assert replica.circuit.state is CircuitState.OPEN
    fleet.tick(2.1)
    assert (link.probes, {r.state for r in waiting}) == (2, {RequestState.QUEUED})
    recovery.probed(fleet.state, replica, fleet.now, well=True)
    assert replica.circuit.state is CircuitState.CLOSED
    assert {r.state for r in waiting} == {RequestState.RUNNING}


def test_a_session_lost_during_a_probe_is_probed_again() -> None:
    fleet = CoreFleet(replicas=1, breaker={"failures": 1, "open_s": 1.0})
    replica = fleet.replicas[0]
    replica.circuit.failed(fleet.now)
    fleet.tick(1.1)
    assert fleet.link(replica).probes == 1
    fleet.lose(replica)
    fleet.connect(replica)
    recovery.probed(fleet.state, replica, fleet.now, well=True)  # of the session before: no verdict on this one
    fleet.tick(1.0)
    assert fleet.link(replica).probes == 0
    fleet.tick(1.1)
    assert fleet.link(replica).probes == 1


def test_a_replica_far_slower_than_its_kind_is_left_out_for_a_while() -> None:
    fleet = CoreFleet(replicas=5, max_running=64, breaker={"max_ejected": 0.3, "max_open_s": 30.0})
    for i, replica in enumerate(fleet.replicas):
        replica.step_s, replica.steps = (0.02 if i else 0.2), 100
    upkeep.slow_tick(fleet.state, fleet.now)
    assert fleet.replicas[0].ejected_until_s == fleet.now + 30
    assert all(fleet.replica_of(fleet.submit()) is not fleet.replicas[0] for _ in range(30))
    fleet.tick(31)
    assert any(fleet.replica_of(fleet.submit()) is fleet.replicas[0] for _ in range(30))


def test_only_a_share_is_ejected_and_the_slowest_first() -> None:
    fleet = CoreFleet(replicas=8, breaker={"max_ejected": 0.25})
    for i, replica in enumerate(fleet.replicas):
        replica.step_s, replica.steps = (0.02 if i > 2 else 0.2 + i), 100
    upkeep.slow_tick(fleet.state, fleet.now)
    assert [replica.ejected_until_s > fleet.now for replica in fleet.replicas] == [False, True, True] + [False] * 5


def test_steps_are_timed_by_the_time_that_the_engine_was_busy() -> None:
    fleet = CoreFleet(replicas=1)
    for report in range(1, 20):
        fleet.now += 50
        load = tokens_pb2.Load(running=1, steps=10 * report, busy_us=200_000 * report, generated_tokens=10 * report)
        fleet.frame(fleet.replicas[0], load=load)
    assert fleet.replicas[0].step_s == pytest.approx(0.02)


@pytest.mark.parametrize(("prefilling", "slow"), [(True, False), (False, True)])
def test_a_long_prefill_makes_no_replica_slow_and_slow_steps_do(prefilling: bool, slow: bool) -> None:
    fleet = CoreFleet(replicas=5)
    for replica in fleet.replicas:
        steps = busy_us = 0
        for report in range(60):
            odd = replica is fleet.replicas[0]
            # A prompt of 100,000 tokens: a dozen steps of 0.4 s each, in a row, between steps that are as all others'.
            long = odd and 40 <= report < 52 if prefilling else odd
            made, took_us = (1, 400_000) if long and prefilling else (5, 5 * (200_000 if long else 20_000))
            steps, busy_us = steps + made, busy_us + took_us
            load = tokens_pb2.Load(running=1, steps=steps, busy_us=busy_us, generated_tokens=steps)
            fleet.frame(replica, load=load)
            upkeep.slow_tick(fleet.state, fleet.now)
    assert (fleet.replicas[0].ejected_until_s > fleet.now) is slow
    assert not any(replica.ejected_until_s for replica in fleet.replicas[1:])


def test_a_worker_that_never_confirms_a_cancel_is_cut_off() -> None:
    fleet = CoreFleet(replicas=1)
    request = fleet.submit()
    fleet.tick(500)
    replica = fleet.replica_of(fleet.submit())
    replica.alive_s = fleet.now
    fleet.cancel(request)
    upkeep.slow_tick(fleet.state, fleet.now + 100)
    assert not any("confirm" in cut for cut in fleet.link(replica).cuts)
    upkeep.slow_tick(fleet.state, fleet.now + 121)
    assert "did not confirm" in fleet.link(replica).cuts[-1]


def test_nothing_is_taken_after_a_malformed_frame_and_the_stream_goes_on_without_a_gap() -> None:
    fleet = CoreFleet()
    request = fleet.submit(prompt=(7,), max_tokens=10)
    broken = fleet.replica_of(request)
    link, slot = fleet.link(broken), request.slot

    def frame(*tokens: int, counts: int | None = None) -> tuple[Endpoint, bytes]:
        count = [len(tokens) if counts is None else counts]
        return broken, tokens_pb2.Frame(stream=[slot], count=count, token=tokens).SerializeToString()

    on_frames(fleet.state, [frame(1, 2), frame(3, counts=9), frame(4, 5)], fleet.now)
    assert "malformed" in link.cuts[0]
    assert (broken.connected, fleet.replica_of(request) is broken) == (False, False)
    assert list(fleet.started(request).prompt) == [7, 1, 2]
    on_frames(fleet.state, [frame(6)], fleet.now)  # was on its way when the session was cut
    fleet.tokens(request, 3, 4)
    fleet.finish(request)
    assert fleet.received(request) == [1, 2, 3, 4]
    fleet.connect(broken)
    fleet.check_idle()
