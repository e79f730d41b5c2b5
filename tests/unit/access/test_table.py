"""The table has an entry for every method that there is, and none for what there is not."""

from __future__ import annotations

from pathlib import Path

import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from megatoken.access.table import METHODS, ROUTES, Identity, Program, callers_of, callers_of_route
from megatoken.cluster.controller.monitoring.service_discovery import serve_controller_metrics
from megatoken.metrics import new_registry, serve_metrics
from megatoken.v1 import control_pb2, membership_pb2, router_pb2, throughput_pb2, tokens_pb2, worker_pb2

SERVED = {
    Program.CONTROLLER: {"Control", "Membership", "Throughput", "ThroughputAttendance"},
    Program.ROUTER: {"Tokens", "Router", "Throughput"},
    Program.WORKER: {"Tokens", "Worker"},
    Program.AGENT: {"Throughput"},
}
OURS = (control_pb2, membership_pb2, router_pb2, throughput_pb2, tokens_pb2, worker_pb2)
OTHERS = (health_pb2, reflection_pb2)


def methods(module: object, wanted: set[str] | None = None) -> set[str]:
    """/package.Service/Method of every method that a module's descriptor has."""
    services = module.DESCRIPTOR.services_by_name  # type: ignore[attr-defined]
    return {
        f"/{service.full_name}/{method.name}"
        for name, service in services.items()
        if wanted is None or name in wanted
        for method in service.methods
    }


@pytest.mark.parametrize("program", METHODS)
def test_every_method_of_every_service_names_its_callers(program: Program) -> None:
    served = set().union(*(methods(module, SERVED[program]) for module in OURS), *(methods(one) for one in OTHERS))
    assert served == set(METHODS[program])
    assert all(METHODS[program].values()), "an entry without callers"


def test_every_service_is_served_by_somebody() -> None:
    known = set().union(*SERVED.values())
    assert {name for module in OURS for name in module.DESCRIPTOR.services_by_name} == known


def test_what_the_table_does_not_name_is_for_nobody() -> None:
    assert callers_of(Program.WORKER, "/megatoken.v1.Worker/New") == frozenset()
    assert callers_of(Program.WORKER, "/megatoken.v1.Control/Shutdown") == frozenset()


def test_no_stranger_and_no_client_reaches_control() -> None:
    for program, table in METHODS.items():
        for method, callers in table.items():
            if "Control/" in method or "Worker/" in method or "Attend" in method:
                assert not callers & {Identity.ANYONE, Identity.CLIENT, Identity.LEASE}, (program, method)


@pytest.mark.parametrize(
    ("path", "callers"),
    [
        ("/health", {Identity.ANYONE}),
        ("/v1/chat/completions", {Identity.CLIENT}),
        ("/v1/models/a/b", {Identity.CLIENT}),
        ("/v1/responses/resp_1/cancel", {Identity.CLIENT}),
        ("/v1/chat/completions/more", set()),
        ("/health/", set()),
        ("/metrics", set()),
        ("/scale_elastic_ep", set()),
        ("/", set()),
        ("", set()),
        ("//v1/models", set()),
        ("/v1/", set()),
    ],
)
def test_a_path_of_the_edge_is_served_when_the_table_names_it(path: str, callers: set[Identity]) -> None:
    assert callers_of_route(Program.EDGE, path) == callers


def test_the_controllers_metrics_server_has_the_routes_of_the_table_and_no_other() -> None:
    server = serve_controller_metrics(new_registry("controller"), control_pb2.ClusterStatus, "127.0.0.1", 0)
    try:
        assert server.paths == set(ROUTES[Program.CONTROLLER])
    finally:
        server.close()
    other = serve_metrics(new_registry("router"), "127.0.0.1", 0)
    try:
        assert all(other.paths == set(ROUTES[program]) for program in (Program.ROUTER, Program.WORKER, Program.AGENT))
    finally:
        other.close()


def test_the_page_for_operators_names_every_method_and_its_callers() -> None:
    page = Path("docs/security.md").read_text()
    for table in METHODS.values():
        for path, callers in table.items():
            service, _, method = path.rpartition("/")
            if service.startswith("/megatoken"):
                assert method in page or service.rpartition(".")[2] in page, path
            for identity in callers:
                assert identity.value in page
