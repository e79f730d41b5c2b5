"""Whether a request may enter: bounds on requests, tokens and bytes, and deadlines that cannot be met. Pure.

Called once a request, before it is queued. Fairness between those that wait is router/fleet/fair_queue.py; limits of
one API key are router/identity/key_limits.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from megatoken.errors import DeadlineError, MegatokenError, OverloadError, UnavailableError
from megatoken.router.config import AdmissionConfig

if TYPE_CHECKING:
    from megatoken.router.fleet.fleet import Pool

MIN_RETRY_S: Final = 0.1
MAX_RETRY_S: Final = 30.0


def expected_wait_s(pool: Pool) -> float:
    """How long a request that is queued now waits: queued tokens over the model's rate; 0 until that was measured."""
    if not pool.queue.length:
        return 0.0
    rate = pool.measured_tokens_per_s
    return pool.queue.tokens / rate if rate > 0 else 0.0


def retry_after_s(pool: Pool) -> float:
    return min(max(expected_wait_s(pool) / 2, MIN_RETRY_S), MAX_RETRY_S)


def refusal(
    pool: Pool,
    cost_tokens: int,
    choices: int,
    prompt_tokens: int,
    live: int,
    time_left_s: float,
    limits: AdmissionConfig,
) -> MegatokenError | None:
    """Why a request cannot enter now; None when it may. `live` is requests running and queued in the router."""
    if not pool.replicas and not pool.wanted and not pool.hold_s:
        return UnavailableError(f"model: {pool.model!r} has no replica, and none is wanted")
    if not pool.replicas and pool.blocked:
        return UnavailableError(f"model: {pool.model!r} has no replica: {pool.blocked}")
    if live >= limits.max_requests:
        return OverloadError(
            f"the router has {live} requests, max_requests is {limits.max_requests}", retry_after_s(pool)
        )
    must_wait = not pool.open or pool.queue.length > 0
    if must_wait:
        if pool.queue.length >= limits.max_queued_requests:
            return OverloadError(f"{pool.queue.length} requests wait for {pool.model!r} already", retry_after_s(pool))
        if pool.queue.tokens + cost_tokens > limits.max_queued_tokens:
            return OverloadError(
                f"requests of {pool.queue.tokens} tokens wait for {pool.model!r} already", retry_after_s(pool)
            )
        wait_s = expected_wait_s(pool)
        if wait_s > limits.max_queue_s:
            return OverloadError(
                f"{pool.model!r} has {wait_s:.0f} s of requests waiting, max_queue_s is {limits.max_queue_s:.0f}",
                retry_after_s(pool),
            )
    else:
        wait_s = 0.0
    if time_left_s != float("inf"):
        return _deadline(pool, prompt_tokens, cost_tokens // choices - prompt_tokens, time_left_s, wait_s)
    return None


def no_memory(pool: Pool, live_bytes: int, new_bytes: int, limits: AdmissionConfig) -> MegatokenError | None:
    """Why the router cannot keep a request of `new_bytes`, all choices, beside those of `live_bytes` that it has.

    Tokens alone do not say it: schemas, salts and arguments of a request have none.
    """
    if live_bytes + new_bytes <= limits.max_live_bytes:
        return None
    return OverloadError(
        f"the router has requests of {live_bytes} bytes, {new_bytes} more are over max_live_bytes, "
        f"{limits.max_live_bytes}",
        retry_after_s(pool),
    )


def _deadline(
    pool: Pool, prompt_tokens: int, expected: int, time_left_s: float, wait_s: float
) -> MegatokenError | None:
    """The answer must be possible by the deadline: queue, prefill, and a step of a full batch for each token."""
    need_s = wait_s
    if pool.rates_by_kind:
        need_s += min(
            prompt_tokens * rates.prompt_s + expected * (rates.step_s + rates.token_s * batch)
            for rates, batch in pool.rates_by_kind.values()
        )
    if need_s > time_left_s:
        return DeadlineError(f"the deadline is in {time_left_s:.3f} s, an answer takes {need_s:.3f} s as things are")
    return None
