"""Spans of requests, exported by OTLP over gRPC. Nothing of OpenTelemetry is imported while tracing is off.

A request that came with a W3C trace context is traced if that says so; of the others, the sampled share. Who passes a
request on sends the header that `begin` returns, so that the next process' span hangs below this one's, or makes none.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field

from megatoken.v1 import tokens_pb2

HEADER: Final = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
SAMPLED: Final = 1
EXPORT_EVERY_MS: Final = 1000.0
EXPORT_S: Final = 2.0  # longest wait for a collector that does not answer, at the end too
Attributes = Mapping[str, str | int | float | bool | Sequence[str]]


class TracingConfig(BaseModel):
    """Where spans go, and of how many requests."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    endpoint: str = Field(
        pattern=r"^https?://[^\s/]+:\d{1,5}$", description="an OTLP collector's gRPC address, e.g. http://10.0.0.9:4317"
    )
    sample: float = Field(
        0.01, ge=0, le=1, description="share of requests that are traced; a client's own trace context wins"
    )


def finish_reasons(reason: int) -> tuple[str, ...]:
    """A FinishReason for `gen_ai.response.finish_reasons`, which lists one for each choice: ("length",)."""
    names = {number: name for name, number in tokens_pb2.FinishReason.items()}
    return (names.get(reason, str(reason)).removeprefix("FINISH_REASON_").lower(),)


class Span:
    """One traced piece of work. Times are monotonic seconds."""

    __slots__ = ("_span", "header")

    def __init__(self, span: Any) -> None:
        self._span = span
        context = span.get_span_context()
        self.header = f"00-{context.trace_id:032x}-{context.span_id:016x}-01"
        """For those that the work is passed on to."""

    def event(self, name: str, at_s: float, attributes: Attributes | None = None) -> None:
        self._span.add_event(name, attributes, _unix_ns(at_s))

    def set(self, attributes: Attributes) -> None:
        self._span.set_attributes(attributes)

    def end(self, at_s: float, attributes: Attributes, problem: str | None = None) -> None:
        """`problem`: why it failed; None: it did not."""
        self._span.set_attributes(attributes)
        if problem is not None:
            from opentelemetry.trace import StatusCode

            self._span.set_status(StatusCode.ERROR, problem)
        self._span.end(_unix_ns(at_s))


class Tracer:
    """Makes the spans of one process."""

    def __init__(
        self, config: TracingConfig, service: str, instance: str, rng: random.Random, exporter: Any = None
    ) -> None:
        """`service`: megatoken-router, say. `exporter`: in place of OTLP's, for tests."""
        from opentelemetry import trace
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ALWAYS_ON

        if exporter is None:
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

            insecure = config.endpoint.startswith("http://")
            exporter = OTLPSpanExporter(endpoint=config.endpoint, insecure=insecure, timeout=EXPORT_S)
        resource = Resource.create({"service.name": service, "service.instance.id": instance})
        self._provider = TracerProvider(sampler=ALWAYS_ON, resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=EXPORT_EVERY_MS))
        self._otel = trace
        self._tracer = self._provider.get_tracer("megatoken")
        self._sample = config.sample
        self._rng = rng

    def begin(self, name: str, parent: str, at_s: float, attributes: Attributes) -> tuple[str, Span | None]:
        """The header to pass on, and the span if this request is traced. `parent`: the header that came; "": none."""
        known = HEADER.fullmatch(parent) is not None
        if not (int(parent[-2:], 16) & SAMPLED if known else self._rng.random() < self._sample):
            # Said to whoever comes next too: its own dice would begin a trace in the middle.
            trace, span_id = self._rng.getrandbits(127) + 1, self._rng.getrandbits(63) + 1
            return parent if known else f"00-{trace:032x}-{span_id:016x}-00", None
        context = None
        if known:
            otel, flags = self._otel, self._otel.TraceFlags(SAMPLED)
            remote = otel.SpanContext(int(parent[3:35], 16), int(parent[36:52], 16), True, flags)
            context = otel.set_span_in_context(otel.NonRecordingSpan(remote))
        made = self._tracer.start_span(name, context, self._otel.SpanKind.SERVER, attributes, start_time=_unix_ns(at_s))
        span = Span(made)
        return span.header, span

    def close(self) -> None:
        """Exports what there is, for a few seconds at most."""
        self._provider.shutdown()


def tracer_of(config: TracingConfig | None, service: str, instance: str) -> Tracer | None:
    """None where tracing is off."""
    return None if config is None else Tracer(config, service, instance, random.Random())


def _unix_ns(at_s: float) -> int:
    return time.time_ns() + round((at_s - time.monotonic()) * 1e9)
