"""What a worker measures of its requests: histograms and counts, filled once a step or a request, never once a token.

worker/metrics.py exports them; replica.py fills them. All clocks are monotonic seconds.
"""

from __future__ import annotations

from typing import Any, Final

from megatoken.errors import AuthError, ForbiddenError, MegatokenError, OverloadError, RequestError
from megatoken.metrics import (
    DURATION_BUCKETS_S,
    FRAME_TOKENS_BUCKETS,
    ITL_BUCKETS_S,
    QUEUE_BUCKETS_S,
    TTFT_BUCKETS_S,
    FastHistogram,
)
from megatoken.process.loop_lag import LOOP_LAG_BUCKETS_S
from megatoken.v1 import tokens_pb2 as pb

OUTCOME_OF_REASON: Final[dict[int, str]] = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_REPETITION: "repetition",
    pb.FINISH_REASON_CANCELLED: "cancelled",
    pb.FINISH_REASON_ERROR: "error",
}
OUTCOMES: Final = (*OUTCOME_OF_REASON.values(), "unknown")
REFUSALS: Final = ("draining", "invalid", "full", "unauthenticated", "fault")


class WorkerMeasures:
    """The worker's histograms and counts."""

    def __init__(self) -> None:
        self.ttft_s = FastHistogram(TTFT_BUCKETS_S)
        self.itl_s = FastHistogram(ITL_BUCKETS_S)
        self.queue_s = FastHistogram(QUEUE_BUCKETS_S)
        self.duration_s = FastHistogram(DURATION_BUCKETS_S)
        self.frame_tokens = FastHistogram(FRAME_TOKENS_BUCKETS)
        self.loop_lag_s = FastHistogram(LOOP_LAG_BUCKETS_S)
        self.outcomes = dict.fromkeys(OUTCOMES, 0)
        self.refusals = dict.fromkeys(REFUSALS, 0)
        self.frames = 0

    def step(self, gaps_s: Any, first: Any, count: Any) -> None:
        """One engine step: each slot's time since its last token, and whether this was its first."""
        if first.any():
            self.ttft_s.observe_many(gaps_s[first])
            gaps_s = gaps_s[~first]
        if len(gaps_s):
            # The slots of a step moved together, mostly after the same gap; one bucket search serves them all then.
            lowest, highest = float(gaps_s.min()), float(gaps_s.max())
            if highest - lowest < 1e-6 and count is None:
                self.itl_s.observe(lowest, len(gaps_s))
            else:
                self.itl_s.observe_many(gaps_s)

    def scheduled(self, arrived_s: float, scheduled_s: float | None, now_s: float) -> None:
        """A request joined the batch."""
        if scheduled_s is not None:
            self.queue_s.observe(min(max(scheduled_s - arrived_s, 0.0), now_s - arrived_s))

    def frame(self, tokens: int) -> None:
        """A frame was written."""
        self.frames += 1
        self.frame_tokens.observe(tokens)

    def ended(self, reason: int, duration_s: float) -> None:
        """A request ended."""
        self.outcomes[OUTCOME_OF_REASON.get(reason, "unknown")] += 1
        self.duration_s.observe(duration_s)

    def refused(self, error: Exception) -> None:
        """A request never ran; an error that is none of MegatokenError's kinds is a fault of the worker's own."""
        if isinstance(error, RequestError):
            self.refusals["invalid"] += 1
        elif isinstance(error, OverloadError):
            self.refusals["full"] += 1
        elif isinstance(error, AuthError | ForbiddenError):  # without a lease, or with one for something else
            self.refusals["unauthenticated"] += 1
        elif not isinstance(error, MegatokenError):
            self.refusals["fault"] += 1
        else:
            self.refusals["draining"] += 1  # by request, or because the engine is gone and the process about to end
