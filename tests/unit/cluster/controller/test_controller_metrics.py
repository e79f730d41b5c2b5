"""A ClusterStatus as gauges (cluster/controller/monitoring/metrics.py), and as Prometheus targets."""

from __future__ import annotations

import json
import urllib.request

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from megatoken.cluster.controller.monitoring.metrics import MAX_EVENT_KINDS, ControllerMetrics
from megatoken.cluster.controller.monitoring.service_discovery import serve_controller_metrics, targets
from megatoken.v1.control_pb2 import (
    ClusterStatus,
    Event,
    LostRate,
    ModelEfficiency,
    ModelStatus,
    NodeStatus,
    ProcessStatus,
    ReplicaStatus,
    StartPhase,
)


def status() -> ClusterStatus:
    return ClusterStatus(
        cluster="demo",
        generation=3,
        membership_epoch=1,
        membership_version=9,
        unix_s=1000.0,
        nodes=[
            NodeStatus(node="n1", site="fi", state="alive", device_kind="cpu", devices=4, devices_used=2),
            NodeStatus(node="n2", state="dead", device_kind="MI355X", devices=8, devices_out=["3: rank died twice"]),
        ],
        models=[
            ModelStatus(
                model="chat",
                wanted=3,
                ready=1,
                blocked="needs 8 devices with memory",
                blocked_kind="capacity",
                running=5,
            )
        ],
        efficiency=[
            ModelEfficiency(
                model="chat",
                capacity_tokens_per_s=150.0,
                tokens_per_s=120.0,
                lost=[LostRate(cause="idle", tokens_per_s=30.0)],
            )
        ],
        replicas=[
            ReplicaStatus(
                replica="chat-0",
                model="chat",
                state="READY",
                engine="simulated",
                node="n1",
                metrics_address="10.0.0.1:9100",
                kv_usage=0.5,
                generated_tokens_per_s=120.0,
                start_phases=[StartPhase(phase="warm up", seconds=4.5)],
            ),
            ReplicaStatus(
                replica="chat-1", model="chat", state="STARTING", engine="vllm", metrics_address="10.0.0.1:9102"
            ),
            ReplicaStatus(replica="chat-2", model="chat", state="FAILED", engine="vllm"),
        ],
        processes=[
            ProcessStatus(name="router-0", kind="router", node="n1", state="READY", metrics_address="10.0.0.1:9200"),
            ProcessStatus(name="edge-0", kind="edge", node="n1", state="READY", address="10.0.0.1:8000"),
            ProcessStatus(name="router-1", kind="router", node="n2", state="STARTING"),
        ],
    )


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def test_a_status_becomes_gauges(registry: CollectorRegistry) -> None:
    metrics = ControllerMetrics(registry)
    metrics.publish(status())
    expected = {
        ("megatoken_cluster_info", ("cluster", "demo")): 1,
        ("megatoken_cluster_generation",): 3,
        ("megatoken_cluster_nodes", ("state", "dead")): 1,
        ("megatoken_cluster_nodes", ("state", "drained")): 0,
        ("megatoken_cluster_node_up", ("node", "n2"), ("site", ""), ("device_kind", "MI355X")): 0,
        ("megatoken_cluster_node_devices_out", ("node", "n2"), ("site", ""), ("device_kind", "MI355X")): 1,
        ("megatoken_cluster_model_replicas_wanted", ("model", "chat")): 3,
        ("megatoken_cluster_model_blocked", ("model", "chat"), ("reason", "capacity")): 1,
        ("megatoken_cluster_replicas", ("model", "chat"), ("state", "STARTING")): 1,
        ("megatoken_cluster_replicas", ("model", "chat"), ("state", "DRAINING")): 0,
        ("megatoken_cluster_replica_kv_cache_usage_ratio", ("model", "chat"), ("replica", "chat-0")): 0.5,
        ("megatoken_cluster_model_capacity_tokens_per_second", ("model", "chat")): 150.0,
        ("megatoken_cluster_model_lost_tokens_per_second", ("model", "chat"), ("cause", "idle")): 30.0,
        (
            "megatoken_cluster_replica_start_seconds",
            ("model", "chat"),
            ("replica", "chat-0"),
            ("phase", "warm up"),
        ): 4.5,
        ("megatoken_cluster_processes", ("kind", "edge"), ("state", "READY")): 1,
        ("megatoken_cluster_replica_failures_total", ("model", "chat")): 1,
    }
    for (name, *labels), value in expected.items():
        assert registry.get_sample_value(name, dict(labels)) == value, (name, labels)
    starting = {"model": "chat", "replica": "chat-1"}
    assert registry.get_sample_value("megatoken_cluster_replica_kv_cache_usage_ratio", starting) is None


def test_a_replica_that_is_gone_leaves_the_metrics_and_a_failure_counts_once(registry: CollectorRegistry) -> None:
    metrics = ControllerMetrics(registry)
    metrics.publish(status())
    metrics.publish(status())
    later = status()
    del later.replicas[:]
    metrics.publish(later)
    assert b"chat-0" not in generate_latest(registry)
    assert registry.get_sample_value("megatoken_cluster_replica_failures_total", {"model": "chat"}) == 1


def test_events_and_ticks_are_counted_and_event_kinds_are_bounded(registry: CollectorRegistry) -> None:
    metrics = ControllerMetrics(registry)
    for number in range(MAX_EVENT_KINDS + 5):
        metrics.record_event(Event(kind=f"kind.{number}"))
    metrics.record_event(Event(kind="kind.0"))
    metrics.record_tick(0.004)
    metrics.record_tick(2.0, ok=False)
    assert registry.get_sample_value("megatoken_cluster_events_total", {"kind": "kind.0"}) == 2
    assert registry.get_sample_value("megatoken_cluster_events_total", {"kind": "other"}) == 5
    assert registry.get_sample_value("megatoken_cluster_ticks_total", {"outcome": "failed"}) == 1
    assert registry.get_sample_value("megatoken_cluster_tick_seconds_bucket", {"le": "0.005"}) == 1


def test_targets_list_every_process_that_answers_with_its_labels() -> None:
    found = targets(status(), "10.0.0.1:9000")
    assert found == [
        {"targets": ["10.0.0.1:9000"], "labels": {"cluster": "demo", "kind": "controller", "process": "controller"}},
        {
            "targets": ["10.0.0.1:8000"],
            "labels": {"cluster": "demo", "kind": "edge", "process": "edge-0", "node": "n1", "site": "fi"},
        },
        {
            "targets": ["10.0.0.1:9200"],
            "labels": {"cluster": "demo", "kind": "router", "process": "router-0", "node": "n1", "site": "fi"},
        },
        {
            "targets": ["10.0.0.1:9100"],
            "labels": {
                "cluster": "demo",
                "kind": "worker",
                "process": "chat-0",
                "node": "n1",
                "site": "fi",
                "model": "chat",
                "replica": "chat-0",
                "engine": "simulated",
            },
        },
    ]
    assert targets(status(), "10.0.0.1:9000", "https")[1]["labels"]["__scheme__"] == "https"  # type: ignore[index,call-overload]


def test_sd_is_served_beside_metrics_and_follows_the_status(registry: CollectorRegistry) -> None:
    metrics = ControllerMetrics(registry)
    current = [ClusterStatus(cluster="demo", controller="10.0.0.1:7700")]
    server = serve_controller_metrics(registry, lambda: current[0], "127.0.0.1", 0)
    try:

        def get(path: str) -> bytes:
            with urllib.request.urlopen(f"http://127.0.0.1:{server.port}{path}", timeout=5) as answer:
                body: bytes = answer.read()
                return body

        assert [group["targets"] for group in json.loads(get("/sd"))] == [[f"127.0.0.1:{server.port}"]]
        current[0] = status()
        metrics.publish(current[0])
        assert len(json.loads(get("/sd"))) == 4
        assert b'megatoken_cluster_model_replicas_wanted{model="chat"} 3.0' in get("/metrics")
    finally:
        server.close()
