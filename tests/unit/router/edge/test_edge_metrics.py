"""What the edge counts, and that the text has the names of the contract."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from megatoken.metrics import metrics_route
from megatoken.router.edge.metrics import EdgeMetrics
from megatoken.v1.tokens_pb2 import FINISH_REASON_CANCELLED, FINISH_REASON_ERROR, FINISH_REASON_STOP, Finish


def exposition(metrics: EdgeMetrics, *, connected: bool) -> str:
    """As the metrics server of an edge answers."""
    metrics.router_connected(connected)
    return metrics_route(metrics.registry, metrics.http_exposition)()[1].decode()


def samples(metrics: EdgeMetrics) -> dict[tuple[str, str, str], float]:
    """Values by (name, model, outcome)."""
    found = {}
    for family in text_string_to_metric_families(exposition(metrics, connected=True)):
        for sample in family.samples:
            found[sample.name, sample.labels.get("model", ""), sample.labels.get("outcome", "")] = sample.value
    return found


def test_requests_are_counted_by_model_and_outcome() -> None:
    metrics = EdgeMetrics()
    for _ in range(3):
        metrics.started("m")
    metrics.first_token("m", 0.25)
    metrics.ended("m", 1.0, Finish(reason=FINISH_REASON_STOP, generated_tokens=7))
    metrics.ended("m", 1.0, Finish(reason=FINISH_REASON_CANCELLED, generated_tokens=2))
    metrics.ended("m", 1.0, Finish(reason=FINISH_REASON_ERROR, code=8))
    found = samples(metrics)
    assert found["megatoken_edge_requests_started_total", "m", ""] == 3
    assert found["megatoken_edge_requests_total", "m", "stop"] == 1
    assert found["megatoken_edge_requests_total", "m", "cancelled"] == 1
    assert found["megatoken_edge_requests_total", "m", "error"] == 1
    assert found["megatoken_edge_generated_tokens_total", "m", ""] == 9
    assert found["megatoken_edge_requests_running", "m", ""] == 0
    assert found["megatoken_edge_time_to_first_token_seconds_count", "m", ""] == 1
    assert found["megatoken_edge_request_duration_seconds_count", "m", ""] == 3
    assert found["megatoken_edge_router_connected", "", ""] == 1


def test_the_process_is_described_once() -> None:
    text = exposition(EdgeMetrics(), connected=False)
    assert text.count("# TYPE process_cpu_seconds_total") == 1
    assert 'megatoken_build_info{kind="edge"' in text
    assert "megatoken_edge_router_connected 0.0" in text
