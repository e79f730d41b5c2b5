"""`/sd`: Prometheus HTTP service discovery, so that one static job scrapes a cluster that changes.

`targets` turns a ClusterStatus into the JSON that Prometheus' http_sd_config reads. The controller serves it beside its
own /metrics. Only processes that can answer are listed: a replica that is gone disappears with the next refresh.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Final

from prometheus_client import CollectorRegistry

from megatoken.cluster.decide.replica import ReplicaState
from megatoken.metrics import MetricsServer, Route, serve_metrics
from megatoken.v1.control_pb2 import ClusterStatus

SERVING: Final = frozenset({ReplicaState.READY, ReplicaState.DRAINING})

EDGE: Final = "edge"

TargetGroup = dict[str, list[str] | dict[str, str]]


def targets(status: ClusterStatus, controller_address: str, edge_scheme: str = "http") -> list[TargetGroup]:
    """One group a process, sorted by kind and name; `controller_address` is the controller's own metrics address.

    An edge serves its metrics at its own address, by `edge_scheme`. A label whose value is not known is left out, since
    Prometheus drops empty labels anyway.
    """
    sites = {node.node: node.site for node in status.nodes}
    found = [_group(controller_address, cluster=status.cluster, kind="controller", process="controller")]
    for process in sorted(status.processes, key=lambda process: (process.kind, process.name)):
        edge = process.kind == EDGE and not process.metrics_address
        address = process.address if edge else process.metrics_address
        if address:
            more = {"__scheme__": edge_scheme} if edge and edge_scheme != "http" else {}
            found.append(
                _group(
                    address,
                    cluster=status.cluster,
                    kind=process.kind,
                    process=process.name,
                    node=process.node,
                    site=sites.get(process.node, ""),
                    **more,
                )
            )
    for replica in sorted(status.replicas, key=lambda replica: replica.replica):
        if replica.metrics_address and replica.state in SERVING:
            found.append(
                _group(
                    replica.metrics_address,
                    cluster=status.cluster,
                    kind="worker",
                    process=replica.replica,
                    node=replica.node,
                    site=sites.get(replica.node, ""),
                    model=replica.model,
                    replica=replica.replica,
                    engine=replica.engine,
                )
            )
    return found


def _group(address: str, **labels: str) -> TargetGroup:
    return {"targets": [address], "labels": {name: value for name, value in labels.items() if value}}


def sd_route(
    status: Callable[[], ClusterStatus], controller_address: Callable[[], str], edge_scheme: str = "http"
) -> Route:
    """The route for GET /sd; both callables run in the metrics server's thread."""

    def answer() -> tuple[str, bytes]:
        return "application/json", json.dumps(targets(status(), controller_address(), edge_scheme)).encode()

    return answer


def serve_controller_metrics(
    registry: CollectorRegistry,
    status: Callable[[], ClusterStatus],
    host: str,
    port: int,
    advertise_host: str | None = None,
    edge_scheme: str = "http",
) -> MetricsServer:
    """Starts the controller's /metrics and /sd. `advertise_host` is where Prometheus reaches it, when not `host`;
    `edge_scheme` is https where edges have certificates."""
    server: MetricsServer

    def own_address() -> str:
        return f"{advertise_host or host}:{server.port}"

    server = serve_metrics(registry, host, port, routes={"/sd": sd_route(status, own_address, edge_scheme)})
    return server
