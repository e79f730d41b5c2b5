"""The configuration of each process, from the spec and what is known of its node. Pure; the controller calls it.

Loopback where the cluster is one local machine, else every process binds its node's own address (HOST_RULE).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatoken.access.credentials import ClusterSecrets, dump
from megatoken.cluster.decide.backend import ProcessLaunch, ProgramConfig
from megatoken.cluster.decide.fleet import Replica
from megatoken.cluster.decide.replica import ReplicaState
from megatoken.cluster.inventory.topology import CPU_KIND, Inventory, Node
from megatoken.cluster.placement.text import rank_text
from megatoken.cluster.secrets_keeper import process_credentials
from megatoken.cluster.spec.cluster import ClusterSpec
from megatoken.cluster.spec.model import ModelSpec
from megatoken.process.tag import replica_tag
from megatoken.router.config import RouterConfig
from megatoken.router.edge.config import EdgeConfig, EdgeLimits, EdgeModel
from megatoken.worker.config import SimulatedConfig, WorkerConfig
from megatoken.worker.throughput.config import AgentConfig

LOOPBACK = "127.0.0.1"
DEVICES = "MEGATOKEN_NODE_DEVICES"  # the planned ones; the node's actor makes of it what drivers read
NODE_ADDRESS = "MEGATOKEN_NODE_ADDRESS"  # the node's actor makes of it addresses and interfaces


@dataclass(frozen=True, slots=True)
class LaunchContext:
    """What launches depend on beside the spec."""

    controller: str
    """host:port of the controller's gRPC server."""
    ports: Mapping[str, int]
    """routers.port, edge.port and agents.port, as settled."""
    ray_address: str
    local: bool
    """One machine: everything may bind loopback."""
    directory: Callable[[str], Path] = Path
    """Where configs, logs and counters lie on a node, by its id."""
    secrets: ClusterSecrets | None = field(default=None, repr=False)
    """What processes' credentials are made from; None: they get none."""


def worker_launch(
    replica: Replica,
    model: ModelSpec,
    spec: ClusterSpec,
    inventory: Inventory,
    context: LaunchContext,
    placement_group_id: str,
    neighbours: int,
    others: Iterable[Replica] = (),
) -> ProcessLaunch:
    """The worker of one replica. `neighbours`: ranks on its busiest node, its own included; `others`: the fleet."""
    node = _require_node(inventory, replica.placement.driver_node)
    ranks = replica.placement.ranks
    on_cpu, simulated = ranks[0].kind == CPU_KIND, model.engine == "simulated"
    over_ray = len(replica.placement.nodes) > 1 and not simulated
    config = WorkerConfig(
        replica=replica.id,
        process_tag=replica_tag(context.directory(node.id).parent, replica.id),
        model=model.name,
        engine=model.engine,
        source=model.source,
        **_served_weights(replica, others, inventory),
        simulated=(model.simulated or SimulatedConfig()) if simulated else None,
        host=_host(None, node, context),
        counters_dir=str(_counters(node, context)),
        node=node.title,
        site=node.site,
        device_kind=ranks[0].kind,
        devices=tuple(rank_text(rank, inventory) for rank in ranks),
        tensor_parallel=model.parallel.tensor,
        pipeline_parallel=model.parallel.pipeline,
        data_parallel=model.parallel.data,
        expert_parallel=model.parallel.expert > 1,
        dtype=model.dtype,
        max_model_len=model.max_model_len,
        max_running=model.max_running,
        kv_cache_gib=model.kv_cache_gib,
        cpu_threads=model.cpu_threads,
        cpu_ranks=max(1, neighbours) if on_cpu else None,
        engine_args=dict(model.engine_args),
        env=dict(model.env),
        ray_address=context.ray_address if over_ray else None,
        placement_group_id=placement_group_id if over_ray else None,
        rank_devices=tuple(rank.device for rank in ranks) if over_ray else (),
        start_timeout_s=model.start_timeout_s,
        lease_s=spec.control.worker_lease_s,
        tls=spec.security.server_tls,
        tracing=spec.tracing,
        log_level=spec.log_level,
    )
    env = dict(model.env)
    if not on_cpu and not over_ray:
        env[DEVICES] = ",".join(str(rank.device) for rank in ranks if rank.node == node.id)
    return _launch(replica.id, config, node, spec, context, "worker", env)


def _served_weights(replica: Replica, others: Iterable[Replica], inventory: Inventory) -> dict[str, Any]:
    """What a replica of the same spec serves already: this one must serve the same."""
    for other in others:
        serves = other.state in (ReplicaState.READY, ReplicaState.DRAINING)
        if serves and other.facts is not None and other.facts.weights and other.revision == replica.revision:
            node = inventory.node(other.placement.driver_node)
            whose = f"{other.id} on {node.title}" if node is not None else other.id
            return {"weights": dict(other.facts.weights), "weights_of": whose}
    return {}


def router_launch(name: str, node: Node, spec: ClusterSpec, context: LaunchContext) -> ProcessLaunch:
    """One router."""
    routers = spec.routers
    host = _host(routers.host, node, context)
    agent_host = _reachable(_host(spec.agents.host, node, context), node)
    config = RouterConfig(
        router=name,
        host=host,
        port=context.ports["routers.port"],
        reuse_port=True,
        own_port=0,
        metrics_host=LOOPBACK if context.local else host,
        controllers=[context.controller],
        counters_dir=_counters(node, context),
        node=node.title,
        site=node.site,
        policy=routers.policy,
        admission=routers.admission,
        resume=routers.resume,
        breaker=routers.breaker,
        limits=routers.limits,
        delivery=routers.delivery,
        leases=routers.leases,
        request_log=routers.request_log,
        tracing=spec.tracing,
        tls=spec.security.server_tls,
        worker_tls=spec.security.client_tls,
        api_keys_file=spec.security.api_keys_file,
        throughput_agent=f"{agent_host}:{context.ports['agents.port']}" if spec.agents.enabled else None,
    )
    return _launch(name, config, node, spec, context, "router")


def edge_launch(name: str, node: Node, spec: ClusterSpec, context: LaunchContext, router_node: Node) -> ProcessLaunch:
    """One edge, in front of the router of `router_node`."""
    router_host = _reachable(_host(spec.routers.host, router_node, context), router_node)
    config = EdgeConfig(
        edge=name,
        host=_host(spec.edge.host, node, context),
        port=context.ports["edge.port"],
        reuse_port=True,
        router=f"{router_host}:{context.ports['routers.port']}",
        router_tls=spec.security.client_tls,
        models=tuple(_edge_model(model) for model in spec.models if model.source),
        tls=spec.security.server_tls,
        api_keys_file=spec.security.api_keys_file,
        site=node.site,
        limits=EdgeLimits(max_requests=spec.edge.max_requests),
        access_log=spec.edge.access_log,
        tracing=spec.tracing,
        metrics_host=_host(None, node, context),  # never where clients are, even if edge.host is every address
        metrics_port=0,
    )
    return _launch(name, config, node, spec, context)


def agent_launch(name: str, node: Node, spec: ClusterSpec, context: LaunchContext) -> ProcessLaunch:
    """The throughput agent of one node."""
    agents = spec.agents
    config = AgentConfig(
        node=node.title,
        site=node.site,
        host=_host(agents.host, node, context),
        port=context.ports["agents.port"],
        controllers=(context.controller,),
        counters_dir=str(_counters(node, context)),
        backend=agents.backend,
        device=_agent_device(node, agents.device),
        interface=spec.network.interface,
        tick_s=agents.tick_s,
        deadline_s=agents.deadline_s,
        standalone_rates={
            f"{model.name}@{kind}": rate
            for model in spec.models
            for kind, rate in model.standalone_tokens_per_s.items()
            if rate > 0
        },
        tls=spec.security.server_tls,
        controller_tls=spec.security.client_tls,
        log_level=spec.log_level,
    )
    return _launch(name, config, node, spec, context, "agent")


def _agent_device(node: Node, default: int) -> int:
    """The node's own choice, where its label is the number of a device of it."""
    chosen = node.labels.get("agent_device", "")
    return next((device.index for device in node.devices if str(device.index) == chosen), default)


def _launch(
    name: str,
    config: ProgramConfig,
    node: Node,
    spec: ClusterSpec,
    context: LaunchContext,
    role: str = "",
    env: Mapping[str, str] | None = None,
) -> ProcessLaunch:
    """`role`: of the credentials that it gets; empty: none. `env`: its own, before what every process gets."""
    own = process_credentials(context.secrets, role, name) if context.secrets is not None and role else None
    return ProcessLaunch(
        name,
        config,
        node.id,
        str(context.directory(node.id)),
        {**_environment(spec, node, context), **(env or {})},
        credentials=dump(own) if own is not None else "",
    )


def _edge_model(model: ModelSpec) -> EdgeModel:
    return EdgeModel(
        name=model.name,
        source=model.source,
        served_names=model.served_names,
        dtype=model.dtype,
        max_model_len=model.max_model_len,
        chat_template=model.chat_template,
        tool_parser=model.tool_parser,
        reasoning_parser=model.reasoning_parser,
        trust_remote_code=model.trust_remote_code,
    )


def _counters(node: Node, context: LaunchContext) -> Path:
    return context.directory(node.id) / "counters"


def _host(asked: str | None, node: Node, context: LaunchContext) -> str:
    if asked is not None:
        return asked
    return LOOPBACK if context.local else node.address


def _reachable(host: str, node: Node) -> str:
    """The host that others dial for a bind address."""
    return node.address if host in ("0.0.0.0", "::") else host


def _environment(spec: ClusterSpec, node: Node, context: LaunchContext) -> dict[str, str]:
    """For engines and agents."""
    env = dict(spec.network.env)
    if spec.network.interface:
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME"):
            env.setdefault(name, spec.network.interface)
    env[NODE_ADDRESS] = LOOPBACK if context.local else node.address
    env["RAY_ADDRESS"] = context.ray_address
    return env


def _require_node(inventory: Inventory, node_id: str) -> Node:
    node = inventory.node(node_id)
    if node is None:
        raise LookupError(f"node {node_id} is not in the inventory")
    return node
