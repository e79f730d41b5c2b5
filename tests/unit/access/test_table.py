"""The table has an entry for every method that there is, and none for what there is not."""

from __future__ import annotations

import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from megatoken.access.table import METHODS, Identity, Program, callers_of
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
