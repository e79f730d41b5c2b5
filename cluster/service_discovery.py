"""`/sd`: Prometheus HTTP service discovery, so that one static job scrapes a cluster that changes.

`targets` turns a ClusterStatus into the JSON that Prometheus' http_sd_config reads. The controller serves it beside its
own /metrics. Only processes that can answer are listed: a replica that is gone disappears with the next refresh.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Final

from prometheus_client import CollectorRegistry

from cluster.replica import ReplicaState
from megatoken.metrics import MetricsServer, Route, serve_metrics
from megatoken.v1.control_pb2 import ClusterStatus

SERVING: Final = frozenset({ReplicaState.READY, ReplicaState.DRAINING})

TargetGroup = dict[str, list[str] | dict[str, str]]


def targets(status: ClusterStatus, controller_address: str) -> list[TargetGroup]:
    """One group a process, sorted by kind and name; `controller_address` is the controller's own metrics address.

    A label whose value is not known is left out, since Prometheus drops empty labels anyway.
    """
    sites = {node.node: node.site for node in status.nodes}
    found = [_group(controller_address, status.cluster, "controller", "controller", "", "")]
    for process in sorted(status.processes, key=lambda process: (process.kind, process.name)):
        if process.metrics_address:
            site = sites.get(process.node, "")
            found.append(
                _group(process.metrics_address, status.cluster, process.kind, process.name, process.node, site)
            )
    for replica in sorted(status.replicas, key=lambda replica: replica.replica):
        if replica.metrics_address and replica.state in SERVING:
            more = {"model": replica.model, "replica": replica.replica, "engine": replica.engine}
            site = sites.get(replica.node, "")
            found.append(
                _group(replica.metrics_address, status.cluster, "worker", replica.replica, replica.node, site, **more)
            )
    return found


def _group(address: str, cluster: str, kind: str, process: str, node: str, site: str, **more: str) -> TargetGroup:
    labels = {"cluster": cluster, "kind": kind, "process": process, "node": node, "site": site, **more}
    return {"targets": [address], "labels": {name: value for name, value in labels.items() if value}}


def sd_route(status: Callable[[], ClusterStatus], controller_address: Callable[[], str]) -> Route:
    """The route for GET /sd; both callables run in the metrics server's thread."""

    def answer() -> tuple[str, bytes]:
        return "application/json", json.dumps(targets(status(), controller_address())).encode()

    return answer


def serve_controller_metrics(
    registry: CollectorRegistry,
    status: Callable[[], ClusterStatus],
    host: str,
    port: int,
    advertise_host: str | None = None,
) -> MetricsServer:
    """Starts the controller's /metrics and /sd. `advertise_host` is where Prometheus reaches it, when not `host`."""
    server: MetricsServer

    def own_address() -> str:
        return f"{advertise_host or host}:{server.port}"

    server = serve_metrics(registry, host, port, routes={"/sd": sd_route(status, own_address)})
    return server
