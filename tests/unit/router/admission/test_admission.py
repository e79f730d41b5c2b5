"""When a request may enter, at each bound, and what is said when it may not."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from megatoken.errors import DeadlineError, MegatokenError, OverloadError, UnavailableError
from megatoken.router.admission.admission import expected_wait_s, no_memory, refusal, retry_after_s
from megatoken.router.config import AdmissionConfig
from megatoken.router.fleet.capacity import Rates
from megatoken.router.fleet.fleet import Pool
from tests.support.router_core import CoreFleet

LIMITS = AdmissionConfig(
    max_requests=10, max_queued_requests=4, max_queued_tokens=1000, max_queue_s=20.0, max_live_bytes=5000
)


def pool_with(queued: int = 0, tokens: int = 0, rate: float = 0.0, replicas: int = 1, busy: bool = False) -> Pool:
    fleet = CoreFleet(replicas=replicas)
    pool = fleet.pool
    for i in range(queued):
        pool.queue.push(SimpleNamespace(tenant="t", priority=0, cost_tokens=0 if i else tokens))
    pool.measured_tokens_per_s = rate
    if busy:
        pool.open.clear()
    return pool


def asked(pool: Pool, **given: Any) -> MegatokenError | None:
    usual = {"cost_tokens": 100, "choices": 1, "prompt_tokens": 40, "live": 0, "time_left_s": math.inf}
    return refusal(pool, **{**usual, **given}, limits=LIMITS)


@pytest.mark.parametrize(
    ("queued", "tokens", "rate", "wait_s", "retry_s"),
    [
        (0, 0, 100.0, 0.0, 0.1),
        (1, 500, 0.0, 0.0, 0.1),
        (1, 500, 0.5, 1000.0, 30.0),
        (1, 500, 100.0, 5.0, 2.5),
        (2, 20, 100.0, 0.2, 0.1),
        (1, 40, 100.0, 0.4, 0.2),
        (3, 5800, 100.0, 58.0, 29.0),
        (3, 6200, 100.0, 62.0, 30.0),
    ],
)
def test_the_wait_is_queued_tokens_over_the_rate_and_half_of_it_a_time_to_come_again(
    queued: int, tokens: int, rate: float, wait_s: float, retry_s: float
) -> None:
    pool = pool_with(queued, tokens, rate)
    assert expected_wait_s(pool) == pytest.approx(wait_s)
    assert retry_after_s(pool) == pytest.approx(retry_s)


@pytest.mark.parametrize(
    ("replicas", "wanted", "blocked", "said"),
    [
        (0, 0, "", "model: 'm' has no replica, and none is wanted"),
        (0, 0, "no device", "model: 'm' has no replica, and none is wanted"),
        (0, 1, "no device", "model: 'm' has no replica: no device"),
        (0, 1, "", None),
        (1, 0, "", None),
        (1, 0, "no device", None),
        (1, 1, "no device", None),
    ],
)
def test_a_model_that_nobody_will_serve_is_unavailable(
    replicas: int, wanted: int, blocked: str, said: str | None
) -> None:
    pool = pool_with(replicas=replicas)
    pool.wanted, pool.blocked = wanted, blocked
    refused = asked(pool)
    assert (str(refused) if refused else None) == said
    assert refused is None or type(refused) is UnavailableError


@pytest.mark.parametrize(("live", "enters"), [(0, True), (9, True), (10, False), (11, False)])
def test_the_router_has_so_many_requests_at_most(live: int, enters: bool) -> None:
    refused = asked(pool_with(2, 400, 100.0), live=live)
    assert (refused is None) is enters
    if refused is not None:
        assert isinstance(refused, OverloadError)
        assert str(refused) == f"the router has {live} requests, max_requests is 10"
        assert refused.retry_after_s == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("queued", "tokens", "rate", "busy", "said"),
    [
        (3, 300, 0.0, True, None),
        (4, 300, 0.0, True, "4 requests wait for 'm' already"),
        (4, 300, 0.0, False, "4 requests wait for 'm' already"),
        (5, 300, 0.0, False, "5 requests wait for 'm' already"),
        (1, 900, 0.0, True, None),
        (1, 901, 0.0, True, "requests of 901 tokens wait for 'm' already"),
        (1, 901, 0.0, False, "requests of 901 tokens wait for 'm' already"),
        (1, 600, 30.0, True, None),
        (1, 630, 30.0, True, "'m' has 21 s of requests waiting, max_queue_s is 20"),
        (1, 601, 30.0, False, "'m' has 20 s of requests waiting, max_queue_s is 20"),
    ],
)
def test_a_queue_is_bounded_by_requests_tokens_and_time(
    queued: int, tokens: int, rate: float, busy: bool, said: str | None
) -> None:
    refused = asked(pool_with(queued, tokens, rate, busy=busy))
    assert (str(refused) if refused else None) == said
    assert refused is None or type(refused) is OverloadError


@pytest.mark.parametrize(("busy", "enters"), [(True, False), (False, True)])
def test_bounds_of_the_queue_hold_for_those_that_must_wait_alone(busy: bool, enters: bool) -> None:
    assert (asked(pool_with(busy=busy), cost_tokens=1001) is None) is enters
    assert asked(pool_with(busy=busy), cost_tokens=1000) is None


@pytest.mark.parametrize(
    ("choices", "cost_tokens", "queued_tokens", "need_s"),
    [
        (1, 100, 0, 40 * 0.01 + 60 * 0.3),
        (2, 200, 0, 40 * 0.01 + 60 * 0.3),  # the choices run beside each other
        (3, 200, 0, 40 * 0.01 + 26 * 0.3),
        (1, 100, 300, 10 + 40 * 0.01 + 60 * 0.3),
    ],
)
def test_a_deadline_leaves_time_for_queue_prompt_and_answer(
    choices: int, cost_tokens: int, queued_tokens: int, need_s: float
) -> None:
    pool = pool_with(1 if queued_tokens else 0, queued_tokens, 30.0)
    pool.rates_by_kind = {"slow": (Rates(0.2, 0.02, 0.02), 10), "fast": (Rates(0.1, 0.02, 0.01), 10)}
    given = {"choices": choices, "cost_tokens": cost_tokens}
    assert asked(pool, **given, time_left_s=need_s + 0.001) is None
    refused = asked(pool, **given, time_left_s=need_s - 0.001)
    assert type(refused) is DeadlineError
    assert str(refused) == (f"the deadline is in {need_s - 0.001:.3f} s, an answer takes {need_s:.3f} s as things are")


@pytest.mark.parametrize(("time_left_s", "enters"), [(9.999, False), (10.0, True), (10.001, True), (math.inf, True)])
def test_before_any_rate_is_known_the_queue_alone_counts_towards_a_deadline(time_left_s: float, enters: bool) -> None:
    assert (asked(pool_with(1, 300, 30.0), time_left_s=time_left_s) is None) is enters


@pytest.mark.parametrize(("time_left_s", "enters"), [(-0.001, False), (0.0, True), (0.001, True)])
def test_one_that_need_not_wait_enters_until_its_deadline(time_left_s: float, enters: bool) -> None:
    assert (asked(pool_with(), time_left_s=time_left_s) is None) is enters


@pytest.mark.parametrize(
    ("live", "new", "enters"), [(0, 5000, True), (4000, 1000, True), (4000, 1001, False), (5001, 0, False)]
)
def test_requests_have_so_many_bytes_at_most(live: int, new: int, enters: bool) -> None:
    refused = no_memory(pool_with(1, 400, 100.0), live, new, LIMITS)
    assert (refused is None) is enters
    if refused is not None:
        assert isinstance(refused, OverloadError)
        assert str(refused) == f"the router has requests of {live} bytes, {new} more are over max_live_bytes, 5000"
        assert refused.retry_after_s == pytest.approx(2.0)
