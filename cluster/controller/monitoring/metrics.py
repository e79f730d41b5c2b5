"""The controller's Prometheus metrics: what its published ClusterStatus says, by the names of docs/metrics.md.

The controller calls `publish` with each status, `record_event` with each event and `record_tick` after each turn of its
loop; Prometheus scrapes from another thread and sees the last status published. Decides nothing but which of the
bounded reasons a sentence belongs to.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterable
from typing import Final

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from megatoken.cluster.decide.replica import ReplicaState
from megatoken.metrics import FastHistograms
from megatoken.v1.control_pb2 import ClusterStatus, Event

TICK_BUCKETS_S: Final = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
NODE_STATES: Final = ("alive", "draining", "drained", "dead")
MAX_EVENT_KINDS: Final = 64  # kinds are an enumeration of ours; the bound holds when that changes


def status_families(status: ClusterStatus) -> list[Metric]:
    """Every gauge that one status gives; a model or replica that is gone from it is gone from the metrics."""
    return [*_cluster(status), *_nodes(status), *_models(status), *_replicas(status), _processes(status)]


class ControllerMetrics(Collector):
    """What the controller exports. One thread writes, scrapes read whole values."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._status = ClusterStatus()
        self._events = Counter(
            "megatoken_cluster_events_total", "Events published, by kind.", ["kind"], registry=registry
        )
        self._event_kinds: set[str] = set()
        self._failures = Counter(
            "megatoken_cluster_replica_failures_total", "Replicas that became FAILED.", ["model"], registry=registry
        )
        self._ticks = Counter(
            "megatoken_cluster_ticks_total", "Turns of the control loop.", ["outcome"], registry=registry
        )
        for outcome in ("ok", "failed"):
            self._ticks.labels(outcome)
        self._faults = Counter(
            "megatoken_cluster_faults_total",
            "Failures that the controller survived, by what failed.",
            ["what"],
            registry=registry,
        )
        self._tick_s = FastHistograms(
            "megatoken_cluster_tick_seconds", "One turn of the control loop.", TICK_BUCKETS_S, (), registry
        )
        self._failed_seen: set[str] = set()
        registry.register(self)

    def publish(self, status: ClusterStatus) -> None:
        """Takes a status as the present one; the caller does not change it afterwards."""
        failed = {replica.replica: replica.model for replica in status.replicas if replica.state == ReplicaState.FAILED}
        for model in status.models:
            self._failures.labels(model.model)  # from 0, so that the first failure is an increase
        for replica, model_name in failed.items():
            if replica not in self._failed_seen:
                self._failures.labels(model_name).inc()
        self._failed_seen = set(failed)
        self._status = status

    @property
    def status(self) -> ClusterStatus:
        """The last status published: what /sd lists."""
        return self._status

    def record_event(self, event: Event) -> None:
        """Counts an event by its kind."""
        kind = event.kind if event.kind in self._event_kinds or len(self._event_kinds) < MAX_EVENT_KINDS else "other"
        self._event_kinds.add(kind)
        self._events.labels(kind).inc()

    def record_fault(self, what: str) -> None:
        """Counts something that failed and was survived; `what` is one of a few constants."""
        self._faults.labels(what).inc()

    def record_tick(self, seconds: float, ok: bool = True) -> None:
        """Counts one turn of the control loop and how long it took."""
        self._ticks.labels("ok" if ok else "failed").inc()
        self._tick_s[()].observe(seconds)

    def collect(self) -> Iterable[Metric]:
        return status_families(self._status)

    def describe(self) -> Iterable[Metric]:
        return ()  # nothing collides: every name here begins with megatoken_cluster_


def _gauge(what: str, help_text: str, labels: Iterable[str] = ()) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"megatoken_cluster_{what}", help_text, labels=list(labels))


def _single(what: str, help_text: str, value: float) -> GaugeMetricFamily:
    family = _gauge(what, help_text)
    family.add_metric([], value)
    return family


def _cluster(status: ClusterStatus) -> list[Metric]:
    info = _gauge("info", "Always 1; the cluster's name.", ["cluster"])
    info.add_metric([status.cluster], 1)
    return [
        info,
        _single("generation", "Generation of the desired state.", status.generation),
        _single("membership_epoch", "Epoch of the membership snapshot.", status.membership_epoch),
        _single("membership_version", "Version of the membership snapshot.", status.membership_version),
        _single("status_timestamp_seconds", "When the controller last published.", status.unix_s),
    ]


def _nodes(status: ClusterStatus) -> list[Metric]:
    states = _gauge("nodes", "Nodes by state.", ["state"])
    tally = Tally(node.state for node in status.nodes)
    for state in sorted({*NODE_STATES, *tally}):
        states.add_metric([state], tally[state])
    labels = ["node", "site", "device_kind"]
    up = _gauge("node_up", "1 when the node is alive.", labels)
    devices = _gauge("node_devices", "Devices of the node.", labels)
    used = _gauge("node_devices_used", "Devices that replicas hold.", labels)
    out = _gauge("node_devices_out", "Devices left out as unhealthy.", labels)
    for node in status.nodes:
        who = [node.node, node.site, node.device_kind]
        up.add_metric(who, float(node.state != "dead"))
        devices.add_metric(who, node.devices)
        used.add_metric(who, node.devices_used)
        out.add_metric(who, len(node.devices_out))
    return [states, up, devices, used, out]


def _models(status: ClusterStatus) -> list[Metric]:
    wanted = _gauge("model_replicas_wanted", "Replicas asked for.", ["model"])
    ready = _gauge("model_replicas_ready", "Replicas that serve.", ["model"])
    blocked = _gauge("model_blocked", "1 while fewer run than wanted, for that reason.", ["model", "reason"])
    needed = _gauge("model_replicas_needed", "What autoscaling finds needed, before bounds.", ["model"])
    rollout = _gauge("model_rollout", "1 while an update is in progress.", ["model"])
    running = _gauge("model_requests_running", "Requests in replicas' batches.", ["model"])
    waiting = _gauge("model_requests_waiting", "Requests queued in engines and routers.", ["model"])
    rate = _gauge("model_generated_tokens_per_second", "Generated tokens a second.", ["model"])
    for model in status.models:
        who = [model.model]
        wanted.add_metric(who, model.wanted)
        ready.add_metric(who, model.ready)
        if model.HasField("autoscaling"):
            needed.add_metric(who, model.autoscaling.need)
        if model.blocked_kind:
            blocked.add_metric([model.model, model.blocked_kind], 1)
        rollout.add_metric(who, float(bool(model.rollout)))
        running.add_metric(who, model.running)
        waiting.add_metric(who, model.waiting)
        rate.add_metric(who, model.generated_tokens_per_s)
    capacity = _gauge("model_capacity_tokens_per_second", "Its READY replicas at the best of their kind.", ["model"])
    lost = _gauge("model_lost_tokens_per_second", "Capacity less rate over 10 s, by cause.", ["model", "cause"])
    for efficiency in status.efficiency:
        capacity.add_metric([efficiency.model], efficiency.capacity_tokens_per_s)
        for entry in efficiency.lost:
            lost.add_metric([efficiency.model, entry.cause], entry.tokens_per_s)
    return [wanted, needed, ready, blocked, rollout, running, waiting, rate, capacity, lost]


def _replicas(status: ClusterStatus) -> list[Metric]:
    by_state = _gauge("replicas", "Replicas by model and state.", ["model", "state"])
    tally = Tally((replica.model, replica.state) for replica in status.replicas)
    names = sorted({model.model for model in status.models} | {replica.model for replica in status.replicas})
    for name in names:
        for state in ReplicaState:
            by_state.add_metric([name, state], tally[name, state])
    info = _gauge("replica_info", "Always 1; what a replica is.", ["model", "replica", "engine", "node", "state"])
    who = ["model", "replica"]
    rate = _gauge("replica_generated_tokens_per_second", "Generated tokens a second.", who)
    kv = _gauge("replica_kv_cache_usage_ratio", "Share of KV cache blocks in use.", who)
    start = _gauge("replica_start_seconds", "What each phase of its start took.", [*who, "phase"])
    for replica in status.replicas:
        for phase in replica.start_phases:
            start.add_metric([replica.model, replica.replica, phase.phase], phase.seconds)
        info.add_metric([replica.model, replica.replica, replica.engine, replica.node, replica.state], 1)
        if replica.state in (ReplicaState.READY, ReplicaState.DRAINING):
            rate.add_metric([replica.model, replica.replica], replica.generated_tokens_per_s)
            kv.add_metric([replica.model, replica.replica], replica.kv_usage)
    return [by_state, info, rate, kv, start]


def _processes(status: ClusterStatus) -> Metric:
    family = _gauge("processes", "Routers, edges and agents by state.", ["kind", "state"])
    for (kind, state), number in sorted(Tally((entry.kind, entry.state) for entry in status.processes).items()):
        family.add_metric([kind, state], number)
    return family
