"""A stand-in for an OpenTelemetry collector: OTLP's own trace service over gRPC, that keeps what it is sent."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc


@dataclass(frozen=True)
class Seen:
    """One span as it came."""

    service: str
    name: str
    trace: str
    span: str
    parent: str
    attributes: dict[str, Any]
    events: list[str]
    began_ns: int
    ended_ns: int
    failed: bool


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Serves on a free port of `host` while it is open."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        self._lock = threading.Lock()
        self._spans: list[Seen] = []
        self._server = grpc.server(ThreadPoolExecutor(2))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)
        self.endpoint = f"http://{host}:{self._server.add_insecure_port(f'{host}:0')}"

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(None).wait()

    def Export(self, request: Any, _context: Any) -> Any:
        found = [
            _seen(values(part.resource.attributes)["service.name"], span)
            for part in request.resource_spans
            for scope in part.scope_spans
            for span in scope.spans
        ]
        with self._lock:
            self._spans += found
        return trace_service_pb2.ExportTraceServiceResponse()

    def spans(self, trace: str = "") -> list[Seen]:
        """Those of one trace, or all; oldest first."""
        with self._lock:
            found = [one for one in self._spans if trace in ("", one.trace)]
        return sorted(found, key=lambda one: one.began_ns)

    def wait(self, count: int, trace: str = "", timeout_s: float = 20.0) -> list[Seen]:
        """Exporters send every few seconds."""
        deadline = time.monotonic() + timeout_s
        while len(found := self.spans(trace)) < count:
            if time.monotonic() > deadline:
                raise AssertionError(f"{len(found)} spans instead of {count}: {found}")
            time.sleep(0.05)
        return found


def values(attributes: Any) -> dict[str, Any]:
    return {one.key: _value(one.value) for one in attributes}


def _value(value: Any) -> Any:
    found = getattr(value, value.WhichOneof("value"))
    return [_value(entry) for entry in found.values] if value.HasField("array_value") else found


def _seen(service: str, span: Any) -> Seen:
    return Seen(
        service,
        span.name,
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        values(span.attributes),
        [event.name for event in span.events],
        span.start_time_unix_nano,
        span.end_time_unix_nano,
        span.status.code == 2,
    )
