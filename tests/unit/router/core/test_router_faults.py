"""A fault inside the router: it costs what it arose in, is counted, and no stream has a gap."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest

from megatoken.process.supervise import Faults
from megatoken.router.core import accounts, ending, placement, upkeep
from megatoken.router.core.request import Request
from megatoken.router.fleet.fleet import Endpoint
from megatoken.router.identity.api_keys import ApiKey
from megatoken.router.intake import demux, finishes, intake
from megatoken.router.intake.intake import on_frames
from megatoken.router.shell.request_log import log_request
from megatoken.tokens import outbox
from megatoken.v1 import tokens_pb2
from tests.support.router_core import ERROR, CoreFleet

INTERNAL = 13
LONE = ApiKey(name="lone", sha256="0" * 64, concurrency=1)


def quiet(fleet: CoreFleet) -> Faults:
    """Lets faults be counted, as a process does."""
    fleet.state.faults = Faults()
    return fleet.state.faults


def two(**settings: Any) -> tuple[CoreFleet, Request, Request]:
    """A fleet, and a request on each of its two replicas; a third is there to go on on."""
    fleet = CoreFleet(replicas=2, max_running=1, admission={"replica_slack": 1.0}, **settings)
    requests = fleet.submit(max_tokens=50), fleet.submit(max_tokens=50)
    fleet.add_replica("m-2", max_running=8)
    return fleet, *requests


def frame(request: Request, *tokens: int, **fields: Any) -> tuple[Endpoint, bytes]:
    encoded = tokens_pb2.Frame(stream=[request.slot], count=[len(tokens)], token=tokens, **fields)
    assert request.replica is not None
    return request.replica, encoded.SerializeToString()


def test_an_unknown_finish_reason_with_the_log_on_costs_nobody_a_token(caplog: pytest.LogCaptureFixture) -> None:
    fleet, a, b = two()
    fleet.state.on_finished.append(log_request)
    end = tokens_pb2.Finish(stream=a.slot, reason=77)  # type: ignore[arg-type]  # of a newer worker
    with caplog.at_level(logging.INFO):
        on_frames(fleet.state, [frame(b, 1), frame(a, 9, finish=[end]), frame(b, 2), frame(b, 3)], fleet.now)
    assert (fleet.received(a), fleet.received(b)) == ([9], [1, 2, 3])
    assert [record.fields["reason"] for record in caplog.records] == ["77"]  # type: ignore[attr-defined]


def test_who_listens_to_ends_cannot_disturb_them() -> None:
    fleet, a, b = two()
    faults = quiet(fleet)

    def listen(*_: object) -> None:
        raise OSError("disk full")

    fleet.state.on_finished.append(listen)
    end = tokens_pb2.Finish(stream=a.slot, reason=tokens_pb2.FINISH_REASON_STOP)
    on_frames(fleet.state, [frame(a, 9, finish=[end]), frame(b, 1), frame(b, 2)], fleet.now)
    assert fleet.end(a) is not None
    assert fleet.received(b) == [1, 2]
    assert faults.counts == {"request log": 1}


@pytest.mark.parametrize("once", [True, False], ids=["recorded_in_part", "not_at_all"])
def test_a_frame_that_cannot_be_recorded_moves_its_own_requests_without_a_gap(
    once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet, a, b = two()
    faults = quiet(fleet)
    on_frames(fleet.state, [frame(a, *range(31)), frame(b, 1)], fleet.now)
    bad = fleet.replica_of(a)
    real = demux._split

    def split(slots: Any, slot: Any, *rest: Any) -> None:
        if a.slot in slot.tolist():
            raise MemoryError
        real(slots, slot, *rest)

    append = fleet.state.pages.append_each

    def half(slots: Any, position: Any, tokens: Any) -> None:
        append(slots, position, tokens)
        if 99 in tokens.tolist():
            raise MemoryError

    if once:
        monkeypatch.setattr(fleet.state.pages, "append_each", half)
    else:
        monkeypatch.setattr(demux, "_split", split)
    on_frames(fleet.state, [frame(a, 98, 100, 99), frame(b, 2), frame(b, 3)], fleet.now)
    monkeypatch.undo()
    assert fleet.received(b) == [1, 2, 3]
    assert fleet.received(a) == list(range(31))
    assert faults.counts == {"tokens": 1}
    assert not bad.connected
    assert list(fleet.started(a).prompt) == [1, 2, 3, *range(31)]  # from what was recorded, page by page
    fleet.tokens(a, 31, 32)
    fleet.finish(a)
    fleet.finish(b)
    assert fleet.received(a) == list(range(33))
    fleet.check_idle()


def test_history_is_as_it_was_after_an_append_that_failed() -> None:
    fleet, a, _ = two()
    pages = fleet.state.pages
    fleet.tokens(a, *range(40))
    used, slots = pages.pages_in_use, np.array([a.slot])
    pages.append_run(a.slot, 40, np.arange(40, 140, dtype=np.uint32))
    pages.trim(slots)
    assert pages.pages_in_use == used
    assert pages.read(a.slot, 0, 40).tolist() == list(range(40))


def test_a_fault_in_the_details_of_one_frame_moves_its_requests_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet, a, b = two()
    faults = quiet(fleet)
    detail = tokens_pb2.Detail(stream=a.slot)
    batch = [frame(b, 1), frame(a, 5, detail=[detail]), frame(b, 2)]
    monkeypatch.setattr(intake, "details_by_slot", lambda *_: 1 / 0)
    on_frames(fleet.state, batch, fleet.now)
    assert (fleet.received(a), fleet.received(b)) == ([], [1, 2])
    assert fleet.replica_of(a).name == "m-2"
    assert faults.counts == {"details": 1}


def test_a_finish_that_cannot_be_taken_ends_its_request_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet, a, b = two()
    faults = quiet(fleet)
    real = accounts.uncharge
    monkeypatch.setattr(
        finishes, "uncharge", lambda state, request, now: 1 / 0 if request is a else real(state, request, now)
    )
    ends = [tokens_pb2.Finish(stream=request.slot, reason=tokens_pb2.FINISH_REASON_STOP) for request in (a, b)]
    on_frames(fleet.state, [frame(a, 1, finish=ends[:1]), frame(b, 2, finish=ends[1:])], fleet.now)
    first, second = fleet.end(a), fleet.end(b)
    assert first is not None
    assert second is not None
    assert (first.reason, first.code, second.reason) == (ERROR, INTERNAL, tokens_pb2.FINISH_REASON_STOP)
    assert faults.counts == {"finish": 1}
    fleet.check_idle()
    assert fleet.state.slots.taken == 0, "its worker will not say a second time that it ended"


def test_a_request_that_no_policy_can_choose_for_ends_and_lets_the_others_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = CoreFleet()
    faults = quiet(fleet)
    choose = fleet.pool.policy.choose

    def picky(pool: Any, asked: Any, rng: Any) -> Any:
        return choose(pool, asked, rng) if asked.affinity != "bad" else 1 / 0

    monkeypatch.setattr(type(fleet.pool.policy), "choose", lambda _self, *rest: picky(*rest))
    bad, good = fleet.submit(affinity="bad"), fleet.submit()
    end = fleet.end(bad)
    assert end is not None
    assert end.code == INTERNAL
    assert good.replica is not None
    assert faults.counts == {"choice": 1}
    fleet.finish(good)
    fleet.check_idle()


def test_a_start_that_cannot_be_sent_ends_its_request_with_nothing_left_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = CoreFleet(replicas=1)
    faults = quiet(fleet)
    monkeypatch.setattr(fleet.link(fleet.replicas[0]), "send_start", lambda *_: 1 / 0)
    end = fleet.end(fleet.submit())
    assert end is not None
    assert end.code == INTERNAL
    assert faults.counts == {"placement": 1}
    fleet.check_idle()
    assert fleet.state.slots.taken == 0, "a worker that never heard of it confirms no end"


def test_a_tick_looks_at_every_replica_and_model_whatever_is_wrong_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet, _, _ = two(resume={"hang_s": 1.0})
    faults = quiet(fleet)
    real = upkeep._watch
    broken, *others = fleet.replicas_now()

    def watch(state: Any, replica: Any, *rest: Any) -> None:
        if replica is broken:
            raise KeyError("x")
        real(state, replica, *rest)

    monkeypatch.setattr(upkeep, "_watch", watch)
    fleet.tick(5.0)
    assert fleet.link(others[0]).cuts
    assert faults.counts == {"upkeep": 1}


def once(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
    """The next call of it raises, and none after that."""
    real = getattr(owner, name)

    def raising(*_: Any) -> None:
        monkeypatch.setattr(owner, name, real)
        raise MemoryError

    monkeypatch.setattr(owner, name, raising)


def test_a_group_of_frames_that_cannot_be_taken_leaves_no_gap_and_the_rest_of_the_batch_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fleet, a, b = two()
    faults = quiet(fleet)
    on_frames(fleet.state, [frame(a, 1), frame(b, 1)], fleet.now)
    third = fleet.submit(max_tokens=50)
    once(monkeypatch, intake, "_take_group")
    on_frames(fleet.state, [frame(a, 2), frame(b, 2), frame(a, 3), frame(b, 3), frame(third, 7)], fleet.now)
    assert (fleet.received(a), fleet.received(b)) == ([1], [1])
    assert [list(fleet.started(request).prompt) for request in (a, b)] == [[1, 2, 3, 1]] * 2
    assert fleet.received(third) == [7]
    assert faults.counts == {"frame": 2}


def test_a_fault_while_requests_are_placed_keeps_no_frame_from_being_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet, a, b = two()
    faults = quiet(fleet)
    once(monkeypatch, placement, "_place_all")
    end = tokens_pb2.Finish(stream=a.slot, reason=tokens_pb2.FINISH_REASON_STOP)
    on_frames(fleet.state, [frame(a, 1, finish=[end]), frame(b, 1), frame(b, 2)], fleet.now)
    assert fleet.received(b) == [1, 2]
    assert faults.counts == {"placement": 1}


def test_a_request_that_fails_between_queue_and_replica_ends_and_stays_in_no_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fleet = CoreFleet(replicas=1)
    faults = quiet(fleet)
    once(monkeypatch, placement, "place")
    end = fleet.end(fleet.submit())
    assert end is not None
    assert end.code == INTERNAL
    assert faults.counts == {"placement": 1}
    fleet.check_idle()


@pytest.mark.parametrize(
    "failing",
    [
        lambda fleet: (fleet.state.retries, "started"),
        lambda fleet: (fleet.state.deadlines, "push"),
        lambda fleet: (fleet.pool.queue, "push"),
    ],
)
def test_a_request_that_was_charged_and_cannot_be_queued_ends_and_gives_its_place_back(
    monkeypatch: pytest.MonkeyPatch, failing: Any
) -> None:
    fleet = CoreFleet()
    faults = quiet(fleet)
    once(monkeypatch, *failing(fleet))
    end = fleet.end(fleet.submit(key=LONE, tenant="lone", timeout_s=60))
    assert end is not None
    assert end.code == INTERNAL
    assert faults.counts == {"submission": 1}
    fleet.finish(fleet.submit(key=LONE, tenant="lone", timeout_s=60))
    fleet.check_idle()


@pytest.mark.parametrize(
    "failing",
    [
        lambda fleet: (fleet.state.deadlines, "ended"),
        lambda fleet: (fleet.state.ledger, "add"),
    ],
)
def test_a_key_gets_its_place_back_whatever_account_fails(monkeypatch: pytest.MonkeyPatch, failing: Any) -> None:
    fleet = CoreFleet()
    faults = quiet(fleet)
    request = fleet.submit(key=LONE, tenant="lone", timeout_s=60)
    once(monkeypatch, *failing(fleet))
    fleet.cancel(request)
    assert fleet.end(request) is not None
    assert faults.counts == {"accounts": 1}
    fleet.finish(fleet.submit(key=LONE, tenant="lone", timeout_s=60))
    fleet.check_idle()


def test_a_request_is_in_the_ledger_though_its_key_cannot_be_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = CoreFleet()
    faults = quiet(fleet)
    request = fleet.submit(key=LONE, tenant="lone")
    once(monkeypatch, fleet.state.callers, "leave")
    fleet.finish(request)
    assert faults.counts == {"accounts": 1}
    assert fleet.state.ledger["requests_finished"] == 1
    assert int(fleet.pool.measures.whole_s.counts.sum()) == 1


def test_a_sink_that_fails_once_gets_its_end_and_a_cancel_that_fails_ends_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fleet, a, b = two()
    faults = quiet(fleet)
    once(monkeypatch, fleet.sink, "push_finish")
    fleet.finish(a)
    assert fleet.end(a) is not None
    once(monkeypatch, ending, "settle")
    fleet.cancel(b)
    end = fleet.end(b)
    assert end is not None
    assert end.code == INTERNAL
    assert faults.counts == {"delivery": 1, "end": 1}
    fleet.check_idle()


def test_a_deadline_whose_end_fails_ends_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = CoreFleet()
    faults = quiet(fleet)
    request = fleet.submit(timeout_s=1.0)
    once(monkeypatch, ending, "settle")
    fleet.tick(2.0)
    assert fleet.end(request) is not None
    assert faults.counts == {"end": 1}
    fleet.check_idle()


def test_an_outbox_that_cannot_put_its_parts_together_loses_none(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet, a, _ = two()
    faults = quiet(fleet)
    once(monkeypatch, outbox, "tied")
    for token in range(50):
        fleet.tokens(a, token)
    for token in range(100):
        if a.replica is not None:
            fleet.tokens(a, 50 + token)
    got = fleet.received(a)
    assert got == list(range(len(got)))
    assert len(got) >= 60, "what waited before is all there"
    assert faults.counts == {"delivery": 1}
