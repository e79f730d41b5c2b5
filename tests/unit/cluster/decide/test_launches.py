"""Every configuration the controller writes is one that its program accepts."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
from pydantic import BaseModel

from megatoken.access.credentials import Credentials, new_secrets
from megatoken.access.table import Identity
from megatoken.cluster.decide.backend import ProcessLaunch
from megatoken.cluster.decide.fleet import Replica
from megatoken.cluster.decide.launches import LaunchContext, agent_launch, edge_launch, router_launch, worker_launch
from megatoken.cluster.inventory.topology import Device, Inventory, Node
from megatoken.cluster.placement.place import Placement, Rank
from megatoken.cluster.spec.cluster import ClusterSpec
from megatoken.cluster.spec.load import load_spec
from megatoken.router.config import RouterConfig
from megatoken.router.edge.config import EdgeConfig
from megatoken.worker.config import WorkerConfig
from megatoken.worker.throughput.config import AgentConfig

HEAD = Node("h" * 56, "10.0.0.1", tuple(Device("cpu", number) for number in range(2)), name="alpha", head=True)
OTHER = Node("o" * 56, "10.0.0.2", tuple(Device("mi355x", number) for number in range(8)), name="beta", site="oslo")
NODES = Inventory((HEAD, OTHER))
PORTS = {"routers.port": 7701, "edge.port": 8000, "agents.port": 7800}
Config = TypeVar("Config", bound=BaseModel)
TLS = {"cert_file": "/c.pem", "key_file": "/k.pem", "ca_file": "/a.pem"}


def context(local: bool = True) -> LaunchContext:
    controller = "127.0.0.1:7700" if local else "10.0.0.1:7700"
    return LaunchContext(controller, PORTS, "10.0.0.1:6379", local, Path("/run").joinpath)


def spec(tls: bool = False, mutual: bool = False, **model: Any) -> ClusterSpec:
    values: dict[str, Any] = {"models": [{"name": "m", "source": "builtin:tiny-llama", **model}]}
    if tls:
        values |= {"security": {"tls": {**TLS, "mutual": mutual}}, "agents": {"enabled": False}}
    return ClusterSpec.model_validate(values)


def worker(wanted: ClusterSpec, *ranks: Rank, local: bool = True) -> tuple[WorkerConfig, dict[str, str]]:
    model = wanted.models[0]
    replica = Replica("m-1", "m", model.revision, 1, Placement("m-1", "m", ranks), 0.0)
    launch = worker_launch(replica, model, wanted, NODES, context(local), "ab" * 14, len(ranks))
    return as_read(launch, WorkerConfig), dict(launch.env)


def as_read(launch: ProcessLaunch, program: type[Config]) -> Config:
    """The configuration as the process reads it from its file."""
    return program.model_validate_json(json.dumps(launch.settings))


@pytest.mark.parametrize(("tls", "mutual"), [(False, False), (True, False), (True, True)])
def test_every_program_accepts_what_it_is_given(tls: bool, mutual: bool) -> None:
    wanted = spec(tls, mutual)
    config, _ = worker(wanted, Rank(0, HEAD.id, 0, "cpu"))
    router = as_read(router_launch("r", HEAD, wanted, context()), RouterConfig)
    edge = as_read(edge_launch("e", HEAD, wanted, context(), HEAD), EdgeConfig)
    agent = as_read(agent_launch("a", HEAD, wanted, context()), AgentConfig)
    assert {config.counters_dir, str(router.counters_dir), agent.counters_dir} == {f"/run/{HEAD.id}/counters"}
    assert (config.tls is None, router.tls is None, edge.tls is None) == (not tls,) * 3
    assert config.lease_s == wanted.control.worker_lease_s
    assert agent.controllers == ("127.0.0.1:7700",)
    assert edge.router == "127.0.0.1:7701"
    assert router.throughput_agent == (None if tls else "127.0.0.1:7800")
    if tls and config.tls and router.tls:
        assert (config.tls.client_ca_file is not None, router.tls.client_ca_file is not None) == (mutual, mutual)
        assert router.worker_tls is not None
        assert (router.worker_tls.cert_file is not None) == mutual


@pytest.mark.parametrize("mutual", [False, True])
def test_an_agent_has_tls_on_every_hop(mutual: bool) -> None:
    wanted = load_spec(f"security: {{tls: {{cert_file: /c.pem, key_file: /k.pem, ca_file: /a.pem, mutual: {mutual}}}}}")
    assert wanted.agents.enabled, "agents are on by default, and TLS does not change that"
    agent = as_read(agent_launch("agent-0", HEAD, wanted, context()), AgentConfig)
    assert agent.tls is not None
    assert agent.controller_tls is not None
    assert (agent.tls.client_ca_file is not None) == (agent.controller_tls.cert_file is not None) == mutual


def test_each_process_gets_credentials_of_its_own_and_no_secret_in_its_config() -> None:
    secrets = new_secrets()
    rotated = replace(context(), secrets=secrets)
    wanted = spec()
    replica = Replica(
        "m-1", "m", wanted.models[0].revision, 1, Placement("m-1", "m", (Rank(0, HEAD.id, 0, "cpu"),)), 0.0
    )
    launches = {
        Identity.WORKER: worker_launch(replica, wanted.models[0], wanted, NODES, rotated, "", 1),
        Identity.ROUTER: router_launch("router-0", HEAD, wanted, rotated),
        Identity.AGENT: agent_launch("agent-0", HEAD, wanted, rotated),
    }
    for identity, launch in launches.items():
        own = Credentials.model_validate_json(launch.credentials)
        assert own.token == secrets.token(identity)
        assert own.token not in json.dumps(launch.settings)
        assert own.token not in repr(launch)
    assert edge_launch("edge-0", HEAD, wanted, rotated, HEAD).credentials == "", "it shows its callers' keys"


def test_one_device_runs_without_ray_and_several_in_their_placement_group() -> None:
    alone, _ = worker(spec(), Rank(0, HEAD.id, 0, "cpu"))
    assert (alone.placement_group_id, alone.cpu_ranks) == (None, 1)
    wide, _ = worker(spec(parallel={"tensor": 2}), Rank(0, HEAD.id, 0, "cpu"), Rank(1, HEAD.id, 1, "cpu", tensor=1))
    assert (wide.placement_group_id, wide.ray_address) == ("ab" * 14, "10.0.0.1:6379")
    assert wide.devices == ("rank 0: alpha device 0", "rank 1: alpha device 1")


def test_ranks_that_share_a_nodes_cores_take_a_share_each() -> None:
    def threads(neighbours: int, **model: Any) -> int:
        wanted = spec(**model)
        replica = Replica("m-1", "m", "r", 1, Placement("m-1", "m", (Rank(0, HEAD.id, 0, "cpu"),)), 0.0)
        launch = worker_launch(replica, wanted.models[0], wanted, NODES, context(), "", neighbours)
        assert launch.program == "megatoken.worker"
        return as_read(launch, WorkerConfig).threads(cores=8)

    assert [threads(neighbours) for neighbours in (0, 1, 2, 3, 16)] == [8, 8, 4, 2, 1]
    assert threads(4, cpu_threads=3) == 3


def test_a_gpu_replica_sees_its_planned_device_and_takes_no_cpu_share() -> None:
    config, env = worker(spec(), Rank(0, OTHER.id, 5, "mi355x"), local=False)
    assert (env["CUDA_VISIBLE_DEVICES"], env["HIP_VISIBLE_DEVICES"], config.cpu_ranks) == ("5", "5", None)
    assert (config.host, config.node, config.site, config.device_kind) == ("10.0.0.2", "beta", "oslo", "mi355x")


def test_the_models_environment_wins_and_the_interface_is_pinned() -> None:
    wanted = spec(env={"NCCL_IB_HCA": "mine"})
    network = {"interface": "eth7", "env": {"NCCL_IB_HCA": "theirs", "X": "1"}}
    wanted = ClusterSpec.model_validate({**wanted.model_dump(), "network": network})
    _, env = worker(wanted, Rank(0, HEAD.id, 0, "cpu"))
    assert (env["NCCL_IB_HCA"], env["X"], env["GLOO_SOCKET_IFNAME"]) == ("mine", "1", "eth7")
    assert env["MEGATOKEN_NODE_ADDRESS"] == "127.0.0.1"
