"""The configuration of each process, from the spec and what is known of its node. Pure; the controller calls it.

Loopback where the cluster is one local machine, else every process binds its node's own address (HOST_RULE).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatoken.access.credentials import ClusterSecrets, dump
from megatoken.cluster.decide.backend import ProcessLaunch
from megatoken.cluster.decide.fleet import Replica
from megatoken.cluster.inventory.topology import CPU_KIND, Inventory, Node
from megatoken.cluster.placement.text import rank_text
from megatoken.cluster.secrets_keeper import process_credentials
from megatoken.cluster.spec.cluster import ClusterSpec
from megatoken.cluster.spec.model import ModelSpec

LOOPBACK = "127.0.0.1"
GPU_VISIBILITY = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
WORKER, ROUTER = "megatoken.worker", "megatoken.router"
EDGE, AGENT = "megatoken.router.edge", "megatoken.worker.throughput"


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What launches depend on beside the spec."""

    controller: str
    """host:port of the controller's gRPC server."""
    ports: Mapping[str, int]
    """routers.port and edge.port, as settled."""
    ray_address: str
    local: bool
    """One machine: everything may bind loopback."""
    secrets: ClusterSecrets | None = field(default=None, repr=False)
    """What processes' credentials are made from; None: they get none."""


def worker_launch(
    replica: Replica,
    model: ModelSpec,
    spec: ClusterSpec,
    inventory: Inventory,
    around: Surroundings,
    placement_group_id: str,
    neighbours: int,
) -> ProcessLaunch:
    """The worker of one replica. `neighbours`: ranks on its node, its own included."""
    node = _require_node(inventory, replica.placement.driver_node)
    ranks = replica.placement.ranks
    config: dict[str, Any] = {
        "replica": replica.id,
        "model": model.name,
        "engine": model.engine,
        "source": model.source,
        "host": _host(None, node, around),
        "node": node.title,
        "site": node.site,
        "device_kind": ranks[0].kind,
        "devices": [rank_text(rank, inventory) for rank in ranks],
        "tensor_parallel": model.parallel.tensor,
        "pipeline_parallel": model.parallel.pipeline,
        "data_parallel": model.parallel.data,
        "expert_parallel": model.parallel.expert > 1,
        "dtype": model.dtype,
        "max_model_len": model.max_model_len,
        "max_running": model.max_running,
        "kv_cache_gib": model.kv_cache_gib,
        "cpu_threads": model.cpu_threads,
        "engine_args": dict(model.engine_args),
        "env": dict(model.env),
        "start_timeout_s": model.start_timeout_s,
        "lease_s": spec.control.worker_lease_s,
        "log_level": spec.log_level,
        "tls": _worker_tls(spec),
    }
    if model.engine == "simulated":
        config["simulated"] = model.simulated.model_dump(mode="json") if model.simulated else {}
    elif len(ranks) > 1:
        config |= {"placement_group_id": placement_group_id, "ray_address": around.ray_address}
    env = {**_environment(spec, node, around), **model.env}
    if ranks[0].kind != CPU_KIND and len(replica.placement.nodes) == 1 and "ray_address" not in config:
        devices = ",".join(str(rank.device) for rank in ranks)
        env = {**dict.fromkeys(GPU_VISIBILITY, devices), **env}
    on_cpu = ranks[0].kind == CPU_KIND
    return ProcessLaunch(
        replica.id,
        WORKER,
        config,
        node.id,
        env,
        cpu_ranks=max(1, neighbours) if on_cpu else 0,
        credentials=_credentials(around, "worker", replica.id),
    )


def router_launch(name: str, node: Node, spec: ClusterSpec, around: Surroundings) -> ProcessLaunch:
    """One router."""
    routers = spec.routers
    agent_host = _reachable(_host(spec.agents.host, node, around), node)
    agent = f"{agent_host}:{around.ports['agents.port']}" if spec.agents.enabled else None
    config = {
        "router": name,
        "host": _host(routers.host, node, around),
        "port": around.ports["routers.port"],
        "reuse_port": True,
        "own_port": 0,
        "controllers": [around.controller],
        "node": node.title,
        "site": node.site,
        "policy": routers.policy,
        "admission": routers.admission.model_dump(mode="json"),
        "resume": routers.resume.model_dump(mode="json"),
        "breaker": routers.breaker.model_dump(mode="json"),
        "limits": routers.limits.model_dump(mode="json"),
        "delivery": routers.delivery.model_dump(mode="json"),
        "leases": routers.leases.model_dump(mode="json"),
        "request_log": routers.request_log,
        "tls": _server_tls(spec),
        "worker_tls": _client_tls(spec),
        "api_keys_file": _path(spec.security.api_keys_file),
        "throughput_agent": agent,
    }
    if not around.local:
        config["metrics_host"] = config["host"]
    own = _credentials(around, "router", name)
    return ProcessLaunch(name, ROUTER, config, node.id, _environment(spec, node, around), credentials=own)


def edge_launch(name: str, node: Node, spec: ClusterSpec, around: Surroundings, router_node: Node) -> ProcessLaunch:
    """One edge, in front of the router of `router_node`."""
    router_host = _host(spec.routers.host, router_node, around)
    config = {
        "edge": name,
        "host": _host(spec.edge.host, node, around),
        "port": around.ports["edge.port"],
        "reuse_port": True,
        "router": f"{_reachable(router_host, router_node)}:{around.ports['routers.port']}",
        "router_tls": _client_tls(spec),
        "models": [_edge_model(model) for model in spec.models if model.source],
        "tls": _server_tls(spec),
        "api_keys_file": _path(spec.security.api_keys_file),
        "site": node.site,
        "limits": {"max_requests": spec.edge.max_requests},
        "access_log": spec.edge.access_log,
        "metrics_host": _host(None, node, around),  # never where clients are, even if edge.host is every address
        "metrics_port": 0,
    }
    return ProcessLaunch(name, EDGE, config, node.id, _environment(spec, node, around))


def agent_launch(name: str, node: Node, spec: ClusterSpec, around: Surroundings) -> ProcessLaunch:
    """The throughput agent of one node."""
    agents = spec.agents
    rates = {
        f"{model.name}@{kind}": rate
        for model in spec.models
        for kind, rate in model.standalone_tokens_per_s.items()
        if rate > 0
    }
    config = {
        "node": node.title,
        "site": node.site,
        "host": _host(agents.host, node, around),
        "port": around.ports["agents.port"],
        "controllers": [around.controller],
        "backend": agents.backend,
        "interface": spec.network.interface,
        "tick_s": agents.tick_s,
        "deadline_s": agents.deadline_s,
        "standalone_rates": rates,
        "tls": _server_tls(spec),
        "controller_tls": _client_tls(spec),
        "log_level": spec.log_level,
    }
    own = _credentials(around, "agent", name)
    return ProcessLaunch(name, AGENT, config, node.id, _environment(spec, node, around), credentials=own)


def _credentials(around: Surroundings, kind: str, name: str) -> str:
    own = process_credentials(around.secrets, kind, name) if around.secrets is not None else None
    return dump(own) if own is not None else ""


def _edge_model(model: ModelSpec) -> dict[str, Any]:
    return {
        "name": model.name,
        "source": model.source,
        "served_names": list(model.served_names),
        "dtype": model.dtype,
        "max_model_len": model.max_model_len,
        "chat_template": _path(model.chat_template),
        "tool_parser": model.tool_parser,
        "reasoning_parser": model.reasoning_parser,
        "trust_remote_code": model.trust_remote_code,
    }


def _host(asked: str | None, node: Node, around: Surroundings) -> str:
    if asked is not None:
        return asked
    return LOOPBACK if around.local else node.address


def _reachable(host: str, node: Node) -> str:
    """The host that others dial for a bind address."""
    return node.address if host in ("0.0.0.0", "::") else host


def _environment(spec: ClusterSpec, node: Node, around: Surroundings) -> dict[str, str]:
    """For engines and agents. MEGATOKEN_NODE_ADDRESS makes the node's actor fill in addresses and interfaces."""
    env = dict(spec.network.env)
    if spec.network.interface:
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME"):
            env.setdefault(name, spec.network.interface)
    env["MEGATOKEN_NODE_ADDRESS"] = LOOPBACK if around.local else node.address
    env["RAY_ADDRESS"] = around.ray_address
    return env


def _server_tls(spec: ClusterSpec) -> dict[str, str | None] | None:
    tls = spec.security.tls
    if tls is None:
        return None
    return {
        "cert_file": str(tls.cert_file),
        "key_file": str(tls.key_file),
        "client_ca_file": str(tls.ca_file) if tls.mutual else None,
    }


def _worker_tls(spec: ClusterSpec) -> dict[str, str | None] | None:
    """The same files under the names that WorkerConfig has for them."""
    tls = spec.security.tls
    if tls is None:
        return None
    authority = str(tls.ca_file) if tls.mutual else None
    return {"cert_file": str(tls.cert_file), "key_file": str(tls.key_file), "ca_file": authority}


def _client_tls(spec: ClusterSpec) -> dict[str, str | None] | None:
    tls = spec.security.tls
    if tls is None:
        return None
    own = (str(tls.cert_file), str(tls.key_file)) if tls.mutual else (None, None)
    return {"ca_file": str(tls.ca_file), "cert_file": own[0], "key_file": own[1], "server_name": tls.server_name}


def _path(path: object) -> str | None:
    return None if path is None else str(path)


def _require_node(inventory: Inventory, node_id: str) -> Node:
    node = inventory.node(node_id)
    if node is None:
        raise LookupError(f"node {node_id} is not in the inventory")
    return node
