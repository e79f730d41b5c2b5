"""Which requests are traced, and what is passed on."""

from __future__ import annotations

import random
import subprocess
import sys
import time

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from pydantic import ValidationError

from megatoken.tracing import HEADER, Tracer, TracingConfig

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Traced:
    """A tracer whose spans can be looked at."""

    def __init__(self, sample: float, seed: int = 1) -> None:
        self.exporter = InMemorySpanExporter()
        config = TracingConfig(endpoint="http://127.0.0.1:1", sample=sample)
        self.tracer = Tracer(config, "megatoken-test", "t-0", random.Random(seed), self.exporter)

    def spans(self) -> tuple:
        self.tracer.close()
        return self.exporter.get_finished_spans()


def test_a_client_that_traces_is_followed_whatever_the_share() -> None:
    traced = Traced(sample=0.0)
    header, span = traced.tracer.begin("work", f"00-{TRACE}-{SPAN}-01", 100.0, {"a": 1})
    assert span is not None
    now = time.monotonic()
    span.event("placed", now)
    span.end(now, {"b": "x"})
    (seen,) = traced.spans()
    assert header == f"00-{TRACE}-{seen.context.span_id:016x}-01"
    assert (f"{seen.parent.span_id:016x}", f"{seen.context.trace_id:032x}") == (SPAN, TRACE)
    assert dict(seen.attributes) == {"a": 1, "b": "x"}
    assert [event.name for event in seen.events] == ["placed"]
    assert seen.resource.attributes["service.name"] == "megatoken-test"
    assert abs(seen.end_time / 1e9 - time.time()) < 5
    assert abs((seen.end_time - seen.start_time) / 1e9 - (now - 100.0)) < 0.1


def test_a_client_that_does_not_trace_is_followed_too() -> None:
    traced = Traced(sample=1.0)
    parent = f"00-{TRACE}-{SPAN}-00"
    assert traced.tracer.begin("work", parent, 0.0, {}) == (parent, None)
    assert traced.spans() == ()


@pytest.mark.parametrize(
    "parent", ["", "nonsense", f"00-{TRACE}-{SPAN}", f"00-{'0' * 32}-{SPAN}-01", f"ff-{TRACE}-{SPAN}-1"]
)
def test_of_the_others_a_share_is_traced_and_whoever_comes_next_does_the_same(parent: str) -> None:
    here, next_one = Traced(sample=0.25), Traced(sample=1.0)
    count = 0
    for _ in range(1000):
        header, span = here.tracer.begin("edge", parent, 0.0, {})
        assert HEADER.fullmatch(header)
        passed, below = next_one.tracer.begin("router", header, 0.0, {})
        assert (span is None) == (below is None)
        assert (passed == header) == (below is None)
        for one in (span, below):
            if one is not None:
                one.end(time.monotonic(), {})
        count += span is not None
    assert 200 < count < 300
    assert len(here.spans()) == len(next_one.spans()) == count


def test_a_failure_says_why() -> None:
    traced = Traced(sample=1.0)
    _, span = traced.tracer.begin("work", "", 0.0, {})
    assert span is not None
    span.set({"late": True})
    span.end(1.0, {}, "the engine died")
    (seen,) = traced.spans()
    assert (seen.status.status_code, seen.status.description) == (StatusCode.ERROR, "the engine died")
    assert seen.attributes["late"] is True


@pytest.mark.parametrize(
    "wrong", [{"endpoint": "collector"}, {"endpoint": "http://c:4317/v1"}, {"sample": 1.5}, {"x": 1}]
)
def test_what_is_not_allowed_is_named(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        TracingConfig.model_validate({"endpoint": "http://10.0.0.9:4317", **wrong})


def test_a_router_without_tracing_does_not_load_it() -> None:
    code = "import sys, megatoken.router.shell.app; sys.exit('opentelemetry.sdk' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
