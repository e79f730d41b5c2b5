"""What a router counts and times for each model, for its metrics alone; the ledger keeps the totals that must agree.

The core adds to these as it goes, a few microseconds a request and one addition a frame; router/shell/metrics.py reads
them when Prometheus scrapes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from megatoken.errors import AuthError, DeadlineError, MegatokenError, OverloadError, RequestError
from megatoken.metrics import DURATION_BUCKETS_S, ITL_BUCKETS_S, QUEUE_BUCKETS_S, TTFT_BUCKETS_S, FastHistogram
from megatoken.router.identity.key_limits import KeyLimitError

OUTCOMES: Final = ("unknown", "stop", "length", "cancelled", "error", "repetition")  # by tokens.proto's FinishReason
REFUSALS: Final = ("queue_full", "deadline", "limit", "no_replica", "draining", "invalid", "unauthenticated")
RESUME_CAUSES: Final = ("lost", "drained")


@dataclass(slots=True)
class ModelMeasures:
    """One model's. Counters grow only; times are in seconds."""

    arrived: int = 0  # that could be served, refused or not
    arrived_work_s: float = 0.0  # of a replica's full time, by the rates measured when they came
    started: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    cached_tokens: int = 0
    retries: int = 0
    outcomes: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(OUTCOMES, 0)))
    refusals: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(REFUSALS, 0)))
    resumes: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(RESUME_CAUSES, 0)))
    first_token_s: FastHistogram = field(default_factory=lambda: FastHistogram(TTFT_BUCKETS_S))
    between_tokens_s: FastHistogram = field(default_factory=lambda: FastHistogram(ITL_BUCKETS_S))
    queue_s: FastHistogram = field(default_factory=lambda: FastHistogram(QUEUE_BUCKETS_S))
    whole_s: FastHistogram = field(default_factory=lambda: FastHistogram(DURATION_BUCKETS_S))

    def ended(self, finish_reason: int, seconds: float) -> None:
        """A request ended, with tokens.proto's FinishReason."""
        self.outcomes[OUTCOMES[finish_reason] if 0 <= finish_reason < len(OUTCOMES) else "unknown"] += 1
        self.whole_s.observe(seconds)

    def moved(self, with_tokens: bool, drained: bool) -> None:
        """A request leaves its replica for another: a resume when it has tokens, else a retry."""
        if with_tokens:
            self.resumes["drained" if drained else "lost"] += 1
        else:
            self.retries += 1


def refusal_reason(error: MegatokenError, draining: bool) -> str:
    """Which of REFUSALS an error on its way in is."""
    if isinstance(error, RequestError):
        return "invalid"
    if isinstance(error, AuthError):
        return "unauthenticated"
    if draining:
        return "draining"
    if isinstance(error, DeadlineError):
        return "deadline"
    if isinstance(error, KeyLimitError):
        return "limit"
    return "queue_full" if isinstance(error, OverloadError) else "no_replica"
