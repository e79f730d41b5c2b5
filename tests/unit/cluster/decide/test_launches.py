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
from megatoken.cluster.decide.fleet import Replica, WorkerFacts
from megatoken.cluster.decide.launches import LaunchContext, agent_launch, edge_launch, router_launch, worker_launch
from megatoken.cluster.decide.replica import ReplicaState
from megatoken.cluster.inventory.topology import Device, Inventory, Node
from megatoken.cluster.placement.place import Placement, Rank
from megatoken.cluster.spec.cluster import ClusterSpec
from megatoken.cluster.spec.load import load_spec
from megatoken.router.config import RouterConfig
from megatoken.router.edge.config import EdgeConfig
from megatoken.worker.config import SimulatedConfig, WorkerConfig
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


def test_ray_places_the_ranks_of_a_replica_across_nodes_and_of_no_other() -> None:
    alone, _ = worker(spec(), Rank(0, HEAD.id, 0, "cpu"))
    assert (alone.placement_group_id, alone.cpu_ranks) == (None, 1)
    wide, _ = worker(spec(parallel={"tensor": 2}), Rank(0, HEAD.id, 0, "cpu"), Rank(1, HEAD.id, 1, "cpu", tensor=1))
    assert (wide.placement_group_id, wide.ray_address, wide.rank_devices) == (None, None, ())
    assert wide.devices == ("rank 0: alpha device 0", "rank 1: alpha device 1")
    ranks = Rank(0, HEAD.id, 3, "cpu"), Rank(1, OTHER.id, 1, "cpu", stage=1)
    spread, _ = worker(spec(parallel={"pipeline": 2}), *ranks)
    assert (spread.placement_group_id, spread.ray_address) == ("ab" * 14, "10.0.0.1:6379")
    assert spread.rank_devices == (3, 1)


def test_a_replica_must_have_the_weights_that_another_of_its_spec_serves() -> None:
    wanted, files = spec(), {"model.safetensors": "ab" * 32}
    facts = WorkerFacts("10.0.0.1:1", 1, "vllm", weights=tuple(files.items()))
    place = Placement("m-1", "m", (Rank(0, HEAD.id, 0, "cpu"),))
    starting = Replica("m-2", "m", "r", 1, place, 0.0, ReplicaState.STARTING)

    def given(**fields: Any) -> WorkerConfig:
        other = replace(Replica("m-1", "m", "r", 1, place, 0.0, ReplicaState.READY, facts=facts), **fields)
        launch = worker_launch(starting, wanted.models[0], wanted, NODES, context(), "", 1, (starting, other))
        return as_read(launch, WorkerConfig)

    assert (given().weights, given().weights_of) == (files, "m-1 on alpha")
    assert given(state=ReplicaState.DRAINING).weights == files
    assert given(state=ReplicaState.FAILED).weights == {}
    assert given(revision="another").weights == {}
    assert given(facts=replace(facts, weights=())).weights == {}


@pytest.mark.parametrize(("label", "device"), [("5", 5), ("", 2), ("8", 2), ("five", 2)])
def test_the_agent_reduces_on_the_device_that_its_node_chose(label: str, device: int) -> None:
    wanted = ClusterSpec.model_validate({"models": [], "agents": {"device": 2}})
    node = replace(OTHER, labels={"agent_device": label})
    assert as_read(agent_launch("a", node, wanted, context(False)), AgentConfig).device == device


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
    assert (env["MEGATOKEN_NODE_DEVICES"], config.cpu_ranks) == ("5", None)
    assert (config.host, config.node, config.site, config.device_kind) == ("10.0.0.2", "beta", "oslo", "mi355x")


def test_the_models_environment_wins_and_the_interface_is_pinned() -> None:
    wanted = spec(env={"NCCL_IB_HCA": "mine"})
    network = {"interface": "eth7", "env": {"NCCL_IB_HCA": "theirs", "X": "1"}}
    wanted = ClusterSpec.model_validate({**wanted.model_dump(), "network": network})
    _, env = worker(wanted, Rank(0, HEAD.id, 0, "cpu"))
    assert (env["NCCL_IB_HCA"], env["X"], env["GLOO_SOCKET_IFNAME"]) == ("mine", "1", "eth7")
    assert env["MEGATOKEN_NODE_ADDRESS"] == "127.0.0.1"


def test_the_process_on_a_node_is_told_the_planned_devices_unless_its_ranks_take_them_themselves() -> None:
    def devices(*ranks: Rank, **model: Any) -> str | None:
        return worker(spec(**model), *ranks, local=False)[1].get("MEGATOKEN_NODE_DEVICES")

    near, far = Rank(0, OTHER.id, 2, "mi355x"), Rank(1, OTHER.id, 5, "mi355x", tensor=1)
    assert devices(near, far, parallel={"tensor": 2}) == "2,5"
    assert devices(near, far, parallel={"tensor": 2}, engine="simulated") == "2,5"
    elsewhere = Rank(1, HEAD.id, 0, "mi355x", tensor=1)
    assert devices(near, elsewhere, parallel={"tensor": 2}) is None
    assert devices(near, elsewhere, parallel={"tensor": 2}, engine="simulated") == "2"
    assert devices(Rank(0, HEAD.id, 0, "cpu")) is None


def test_the_simulated_engine_has_its_settings_and_no_other_engine_has_them() -> None:
    rank = Rank(0, HEAD.id, 0, "cpu")
    assert worker(spec(), rank)[0].simulated is None
    plain = worker(spec(engine="simulated"), rank)[0].simulated
    assert plain == SimulatedConfig()
    paced = worker(spec(engine="simulated", simulated={"decode_tokens_per_s": 77.0}), rank)[0].simulated
    assert paced is not None
    assert paced.decode_tokens_per_s == 77.0


def test_routers_and_edges_share_their_ports_and_show_metrics_where_no_client_is() -> None:
    wanted = spec()
    for local, host in ((True, "127.0.0.1"), (False, "10.0.0.1")):
        router = as_read(router_launch("r", HEAD, wanted, context(local)), RouterConfig)
        assert (router.host, router.metrics_host, router.own_port, router.reuse_port) == (host, host, 0, True)
        edge = as_read(edge_launch("e", HEAD, wanted, context(local), HEAD), EdgeConfig)
        assert (edge.host, edge.metrics_host, edge.metrics_port, edge.reuse_port) == (host, host, 0, True)
    everywhere = ClusterSpec.model_validate(
        {
            "models": [{"name": "m", "source": "builtin:tiny-llama"}],
            "routers": {"host": "0.0.0.0"},
            "agents": {"host": "10.9.9.9"},
        }
    )
    router = as_read(router_launch("r", HEAD, everywhere, context()), RouterConfig)
    assert (router.host, router.metrics_host) == ("0.0.0.0", "127.0.0.1")
    assert router.throughput_agent == "10.9.9.9:7800"
    edge = as_read(edge_launch("e", OTHER, everywhere, context(local=False), HEAD), EdgeConfig)
    assert edge.router == "10.0.0.1:7701", "every address is bound, and the node's own is dialled"


def test_an_agent_knows_the_rates_that_were_measured_and_only_those() -> None:
    wanted = spec(standalone_tokens_per_s={"mi355x": 0.5, "cpu": 0})
    agent = as_read(agent_launch("a", HEAD, wanted, context()), AgentConfig)
    assert agent.standalone_rates == {"m@mi355x": 0.5}


def test_processes_are_told_their_node_s_address_where_there_is_more_than_one_machine() -> None:
    for local, address in ((True, "127.0.0.1"), (False, "10.0.0.2")):
        env = dict(agent_launch("a", OTHER, spec(), context(local)).env)
        assert (env["MEGATOKEN_NODE_ADDRESS"], env["RAY_ADDRESS"]) == (address, "10.0.0.1:6379")
