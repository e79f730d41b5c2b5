"""The edge's Prometheus metrics; docs/metrics.md is the contract for names and labels.

Filled by session, once a request and once a frame, never once a token.
"""

from __future__ import annotations

from prometheus_client import REGISTRY, Counter, Gauge, generate_latest

from megatoken.metrics import CONTENT_TYPE, DURATION_BUCKETS_S, TTFT_BUCKETS_S, FastHistograms, new_registry
from megatoken.v1.tokens_pb2 import (
    FINISH_REASON_CANCELLED,
    FINISH_REASON_LENGTH,
    FINISH_REASON_REPETITION,
    FINISH_REASON_STOP,
    Finish,
)

OUTCOMES = {
    FINISH_REASON_STOP: "stop",
    FINISH_REASON_LENGTH: "length",
    FINISH_REASON_CANCELLED: "cancelled",
    FINISH_REASON_REPETITION: "repetition",
}


def outcome(finish: Finish) -> str:
    """The outcome label of an ended request."""
    return OUTCOMES.get(finish.reason, "error")


class EdgeMetrics:
    """What one edge counts."""

    content_type = CONTENT_TYPE

    def __init__(self) -> None:
        self.registry = new_registry("edge")
        self._started = Counter(
            "megatoken_edge_requests_started_total", "Requests sent to the router.", ["model"], registry=self.registry
        )
        self._ended = Counter(
            "megatoken_edge_requests_total", "Requests that ended.", ["model", "outcome"], registry=self.registry
        )
        self._generated = Counter(
            "megatoken_edge_generated_tokens_total", "Tokens from the router.", ["model"], registry=self.registry
        )
        self._running = Gauge(
            "megatoken_edge_requests_running", "Requests at the router now.", ["model"], registry=self.registry
        )
        self._connected = Gauge(
            "megatoken_edge_router_connected", "1 while the Session to the router is up.", registry=self.registry
        )
        self._ttft = FastHistograms(
            "megatoken_edge_time_to_first_token_seconds",
            "From the request's departure to its first token.",
            TTFT_BUCKETS_S,
            ["model"],
            self.registry,
        )
        self._duration = FastHistograms(
            "megatoken_edge_request_duration_seconds",
            "From the request's departure to its end.",
            DURATION_BUCKETS_S,
            ["model"],
            self.registry,
        )

    def started(self, model: str) -> None:
        """A request goes to the router."""
        self._started.labels(model).inc()
        self._running.labels(model).inc()

    def first_token(self, model: str, seconds: float) -> None:
        self._ttft[model,].observe(seconds)

    def ended(self, model: str, seconds: float, finish: Finish) -> None:
        """A request's Finish arrived, a cancelled one's too."""
        self._ended.labels(model, outcome(finish)).inc()
        self._running.labels(model).dec()
        self._generated.labels(model).inc(finish.generated_tokens)
        self._duration[model,].observe(seconds)

    def router_connected(self, up: bool) -> None:
        """Whether the router answers; told about once a second."""
        self._connected.set(1 if up else 0)

    def http_exposition(self) -> bytes:
        """vLLM's HTTP metrics, from the process's default registry. May be called from another thread."""
        return generate_latest(_OnlyHttp())


class _OnlyHttp:
    """The `http_*` families of the default registry; its process metrics are in ours already."""

    def collect(self):  # type: ignore[no-untyped-def]
        return (family for family in REGISTRY.collect() if family.name.startswith("http_"))
