"""What the estimator of a replica's speed takes from its reports, and what it gives back, in exact figures."""

from __future__ import annotations

import pytest

from megatoken.router.fleet.capacity import Capacity, Rates

PULL = 1e-5 / 3  # of the prior, beside one measurement


def test_rates_are_tokens_a_second_at_a_batch_and_prompt_tokens_a_second() -> None:
    rates = Rates(step_s=0.01, token_s=0.0002, prompt_s=0.004)
    assert rates.decode_tokens_per_s(50) == pytest.approx(50 / 0.02)
    assert rates.prefill_tokens_per_s() == pytest.approx(250.0)


def test_what_is_assumed_before_anything_was_measured() -> None:
    capacity = Capacity(batch=64)
    assert capacity.rates == Rates(step_s=0.02, token_s=0.02 / 64, prompt_s=1e-4)
    assert capacity.prior == capacity.rates
    assert capacity.decode_tokens_per_s == pytest.approx(1600.0)  # a full batch takes two empty steps
    assert capacity.prefill_tokens_per_s == pytest.approx(10_000.0)
    assert capacity.measured is False


def test_its_kind_counts_until_something_of_its_own_was_measured() -> None:
    capacity, kind = Capacity(batch=10), Rates(0.5, 0.05, 0.01)
    capacity.adopt(kind)
    assert (capacity.prior, capacity.rates) == (kind, kind)
    assert (capacity.decode_tokens_per_s, capacity.prefill_tokens_per_s) == pytest.approx((10.0, 100.0))
    capacity.observe(1.0, 10, 0, 10.0)
    found = capacity.rates
    capacity.adopt(Rates())
    assert (capacity.prior, capacity.rates) == (kind, found)


@pytest.mark.parametrize(
    ("busy_s", "generated", "counts"),
    [(0.0199, 100, False), (0.02, 100, True), (0.0201, 100, True), (1.0, 0, False), (1.0, -1, False), (1.0, 1, True)],
)
def test_intervals_with_too_little_work_are_left_out(busy_s: float, generated: int, counts: bool) -> None:
    capacity = Capacity(batch=10)
    capacity.observe(busy_s, generated, 0, 10.0)
    assert capacity.measured is counts
    assert (capacity.rates != capacity.prior) is counts


@pytest.mark.parametrize(
    ("running", "steps"),
    [(0.0, 600), (0.5, 600), (1.0, 600), (1.5, 400), (2.0, 300), (6.0, 100)],
)
def test_a_step_makes_a_token_for_each_that_runs_and_one_at_least(running: float, steps: int) -> None:
    capacity = Capacity(batch=8)
    capacity.observe(4.0, 600, 0, running)
    rates = capacity.rates
    assert steps * rates.step_s + 600 * rates.token_s == pytest.approx(4.0, rel=1e-4)


def test_exact_reports_give_the_exact_rates() -> None:
    true = Rates(step_s=0.01, token_s=0.0002, prompt_s=0.00005)
    capacity = Capacity(batch=64)
    for running, prompt in [(1, 0), (64, 0), (8, 5000), (32, 20_000), (64, 1000), (2, 40_000)] * 3:
        busy_s = 50 * true.step_s + 50 * running * true.token_s + prompt * true.prompt_s
        capacity.observe(busy_s, 50 * running, prompt, running)
    assert capacity.rates.step_s == pytest.approx(0.01, rel=2e-3)
    assert capacity.rates.token_s == pytest.approx(0.0002, rel=2e-3)
    assert capacity.rates.prompt_s == pytest.approx(0.00005, rel=2e-3)
    assert capacity.decode_tokens_per_s == pytest.approx(64 / (0.01 + 0.0002 * 64), rel=2e-3)
    assert capacity.prefill_tokens_per_s == pytest.approx(20_000, rel=2e-3)


@pytest.mark.parametrize(
    ("busy_s", "expected_s"),
    [
        ([10.0], 10.0),
        ([10.0, 20.0], 15.0),  # the first, worth a half after 20 s: harmonic, (1/2 + 1) / (1/2/10 + 1/20)
        ([20.0, 40.0], 100 / 3),  # the first, worth a quarter after 40 s: (1/4 + 1) / (1/4/20 + 1/40)
        ([40.0, 20.0], 1.5 / (0.5 / 40 + 1 / 20)),
        ([10.0, 20.0, 20.0], 1.75 / (0.25 / 10 + 0.5 / 20 + 1 / 20)),
    ],
)
def test_a_report_counts_half_after_twenty_busy_seconds(busy_s: list[float], expected_s: float) -> None:
    capacity = Capacity(batch=10)
    for each_s in busy_s:
        capacity.observe(each_s, 1000, 0, 10.0)
    assert 1000 / capacity.decode_tokens_per_s == pytest.approx(expected_s, rel=1e-4)


def test_what_no_report_showed_stays_as_it_was_assumed() -> None:
    capacity = Capacity(batch=10)
    capacity.observe(8.0, 1000, 0, 10.0)  # twice as slow as assumed, and no prompt
    assert capacity.rates.prompt_s == pytest.approx(1e-4, rel=1e-9)
    assert capacity.rates.step_s == pytest.approx(0.04, rel=1e-4)
    assert capacity.rates.token_s == pytest.approx(0.004, rel=1e-4)


@pytest.mark.parametrize("slower", [101.0, 11.0, 0.5])
def test_the_prior_pulls_by_its_weight_alone(slower: float) -> None:
    capacity = Capacity(batch=1)
    capacity.observe(slower * 0.04 * 100, 100, 0, 1.0)
    assert capacity.rates.step_s / 0.02 == pytest.approx((slower + PULL) / (1 + PULL), rel=1e-8)


@pytest.mark.parametrize(
    ("busy_s", "generated", "step_s"),
    [(0.02, 10**9, 2e-5), (1e6, 1, 20.0)],
)
def test_no_report_moves_a_rate_beyond_a_thousandfold(busy_s: float, generated: int, step_s: float) -> None:
    capacity = Capacity(batch=1)
    capacity.observe(busy_s, generated, 0, 1.0)
    assert (capacity.rates.step_s, capacity.rates.token_s) == pytest.approx((step_s, step_s), rel=1e-9)
    assert capacity.decode_tokens_per_s == pytest.approx(1 / (2 * step_s), rel=1e-9)
