"""What is due at certain times: in which order it comes, and how many entries of ended requests are kept."""

from __future__ import annotations

from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest

from megatoken.router.core.due import Due
from megatoken.router.core.lifecycle import RequestState

NUMBERS = count()


def request(state: RequestState = RequestState.RUNNING) -> Any:
    return SimpleNamespace(state=state, number=next(NUMBERS))


def test_entries_come_when_their_time_has_come_earliest_first_and_in_turn_at_the_same_time() -> None:
    due = Due()
    first, second, third, later = (request() for _ in range(4))
    for when_s, one in ((3.0, second), (2.0, first), (3.0, third), (4.0, later)):
        due.push(when_s, one)
    assert list(due.pop_until(1.999)) == []
    assert list(due.pop_until(3.0)) == [first, second, third]
    assert (len(due), list(due.pop_until(3.999)), list(due.pop_until(4.0))) == (1, [], [later])
    assert len(due) == 0


def test_what_is_pushed_while_entries_are_taken_counts_too() -> None:
    due = Due()
    one, two = request(), request()
    due.push(1.0, one)
    found = []
    for taken in due.pop_until(5.0):
        found.append(taken)
        if taken is one:
            due.push(5.0, two)
    assert found == [one, two]


def test_a_request_that_ended_does_not_come() -> None:
    due = Due()
    ended, kept = request(RequestState.FINISHED), request()
    due.push(1.0, ended)
    due.push(1.0, kept)
    assert list(due.pop_until(1.0)) == [kept]


@pytest.mark.parametrize(
    ("entries", "ended", "left"),
    [
        (64, 64, 64), (65, 65, 0), (100, 64, 100), (100, 65, 35),
        (130, 65, 130), (129, 65, 64), (200, 100, 200), (200, 101, 99),
    ],
)  # fmt: skip
def test_the_heap_is_made_anew_once_more_than_64_and_more_than_half_have_ended(
    entries: int, ended: int, left: int
) -> None:
    due = Due()
    requests = [request() for _ in range(entries)]
    for at, one in enumerate(requests):
        due.push(float(entries - at), one)
    for one in requests[:ended]:
        one.state = RequestState.FINISHED
        due.ended()
    assert len(due) == left
    assert list(due.pop_until(1e9)) == requests[ended:][::-1]


def test_ended_entries_whose_time_came_are_no_reason_to_clean_up() -> None:
    due = Due()
    requests = [request() for _ in range(128)]
    for at, one in enumerate(requests):
        due.push(float(at), one)
    for one in requests[:64]:
        one.state = RequestState.FINISHED
        due.ended()
    assert list(due.pop_until(31.0)) == []
    assert len(due) == 96
    for one in requests[64:96]:
        one.state = RequestState.FINISHED
        due.ended()
    assert len(due) == 96, "64 of these have ended"
    requests[96].state = RequestState.FINISHED
    due.ended()
    assert len(due) == 31


def test_an_end_that_was_not_announced_is_no_credit_for_later_ones() -> None:
    due = Due()
    unannounced = [request(RequestState.FINISHED) for _ in range(5)]
    for one in unannounced:
        due.push(1.0, one)
    assert list(due.pop_until(1.0)) == []
    requests = [request() for _ in range(65)]
    for one in requests:
        due.push(2.0, one)
    for one in requests:
        one.state = RequestState.FINISHED
        due.ended()
    assert len(due) == 0


def test_after_a_clean_up_counting_begins_anew() -> None:
    due = Due()
    for _ in range(2):
        requests = [request() for _ in range(65)]
        for one in requests:
            due.push(1.0, one)
        for one in requests[:64]:
            one.state = RequestState.FINISHED
            due.ended()
        assert len(due) == 65
        requests[64].state = RequestState.FINISHED
        due.ended()
        assert len(due) == 0
