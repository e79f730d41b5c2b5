"""Who may call what: the identities, and one table of every gRPC method and HTTP route of every program. Pure.

gate.py enforces the methods, default is no: a method that has no entry is refused to everybody. docs/security.md
explains the table to operators; a test walks descriptors and routes, so that a new one without an entry fails.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final


class Identity(StrEnum):
    """What a caller has shown to be."""

    ANYONE = "anyone"
    CLIENT = "client"
    """Shows an API key. Where a cluster asks for no key, everybody is a client."""
    LEASE = "lease"
    """Shows a lease that a router signed for this very replica; the worker checks it with each request."""
    OPERATOR = "operator"
    CONTROLLER = "controller"
    ROUTER = "router"
    WORKER = "worker"
    AGENT = "agent"


class Program(StrEnum):
    """Whose server is asked. One service may be served by several, to different callers."""

    CONTROLLER = "controller"
    ROUTER = "router"
    WORKER = "worker"
    AGENT = "agent"
    EDGE = "edge"


TOKENED: Final = (Identity.OPERATOR, Identity.CONTROLLER, Identity.ROUTER, Identity.WORKER, Identity.AGENT)
"""Identities that a token of the cluster, or a certificate's role, stands for."""

Callers = frozenset[Identity]

_ANYONE: Final[Callers] = frozenset({Identity.ANYONE})
_OPERATOR: Final[Callers] = frozenset({Identity.OPERATOR})
_CLIENT: Final[Callers] = frozenset({Identity.CLIENT})
_CONTROL: Final[Callers] = frozenset({Identity.CONTROLLER, Identity.OPERATOR})

# Health and the schema tell a stranger nothing that the project's page does not.
_OPEN: Final[Mapping[str, Callers]] = {
    "/grpc.health.v1.Health/Check": _ANYONE,
    "/grpc.health.v1.Health/Watch": _ANYONE,
    "/grpc.health.v1.Health/List": _ANYONE,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": _ANYONE,
}

_V1: Final = "/megatoken.v1."

METHODS: Final[Mapping[Program, Mapping[str, Callers]]] = {
    Program.CONTROLLER: {
        **_OPEN,
        **{
            f"{_V1}Control/{method}": _OPERATOR
            for method in (
                *("Apply", "Scale", "DrainTarget", "Cordon", "Shutdown"),
                *("GetStatus", "GetHistory", "WatchEvents", "GetLogs"),
            )
        },
        f"{_V1}Control/RotateTokens": _OPERATOR,
        f"{_V1}Membership/Watch": frozenset({Identity.ROUTER, Identity.AGENT, Identity.OPERATOR}),
        f"{_V1}Throughput/GetThroughput": _OPERATOR,
        f"{_V1}Throughput/WatchThroughput": _OPERATOR,
        f"{_V1}ThroughputAttendance/Attend": frozenset({Identity.AGENT}),
    },
    Program.ROUTER: {
        **_OPEN,
        f"{_V1}Tokens/Generate": _CLIENT,
        f"{_V1}Tokens/Session": _CLIENT,
        f"{_V1}Router/Assign": _CLIENT,
        f"{_V1}Router/Release": _CLIENT,
        f"{_V1}Router/Leases": _CLIENT,
        f"{_V1}Router/ListModels": _CLIENT | _CONTROL,
        f"{_V1}Router/GetRouterStatus": _CONTROL,
        f"{_V1}Throughput/GetThroughput": _CLIENT | _CONTROL,
        f"{_V1}Throughput/WatchThroughput": _CLIENT | _CONTROL,
    },
    Program.WORKER: {
        **_OPEN,
        f"{_V1}Tokens/Generate": frozenset({Identity.ROUTER, Identity.LEASE}),
        f"{_V1}Tokens/Session": frozenset({Identity.ROUTER, Identity.LEASE}),
        f"{_V1}Worker/Describe": _CONTROL | {Identity.ROUTER},
        f"{_V1}Worker/GetLoad": _CONTROL | {Identity.ROUTER},
        f"{_V1}Worker/Renew": frozenset({Identity.CONTROLLER}),
        f"{_V1}Worker/Drain": frozenset({Identity.CONTROLLER}),
        f"{_V1}Worker/Probe": _CONTROL | {Identity.ROUTER},
        f"{_V1}Worker/WatchPrefixes": frozenset({Identity.ROUTER}),
    },
    Program.AGENT: {
        **_OPEN,
        f"{_V1}Throughput/GetThroughput": _CONTROL | {Identity.ROUTER},
        f"{_V1}Throughput/WatchThroughput": _CONTROL | {Identity.ROUTER},
    },
}

ROUTES: Final[Mapping[Program, Mapping[str, Callers]]] = {
    # Numbers only, on a port of their own that binds loopback on one machine and the node's own address elsewhere.
    Program.CONTROLLER: {"/metrics": _ANYONE, "/sd": _ANYONE},
    Program.ROUTER: {"/metrics": _ANYONE},
    Program.WORKER: {"/metrics": _ANYONE},
    Program.AGENT: {"/metrics": _ANYONE},
    # vLLM's app has more; what is not named here is not served. A path that ends in / stands for all below it.
    Program.EDGE: {
        "/health": _ANYONE,
        "/ping": _ANYONE,
        "/v1/models": _CLIENT,
        "/v1/models/": _CLIENT,
        "/v1/chat/completions": _CLIENT,
        "/v1/chat/completions/batch": _CLIENT,
        "/v1/completions": _CLIENT,
        "/v1/responses": _CLIENT,
        "/v1/responses/": _CLIENT,
        "/v1/messages": _CLIENT,
        "/v1/messages/count_tokens": _CLIENT,
        "/tokenize": _CLIENT,
        "/detokenize": _CLIENT,
        "/invocations": _CLIENT,
        "/generative_scoring": _CLIENT,
        "/openapi.json": _CLIENT,
    },
}


def callers_of(program: Program, method: str) -> Callers:
    """Who may call a gRPC method (`/package.Service/Method`); nobody when the table has no entry."""
    return METHODS[program].get(method, frozenset())


def callers_of_route(program: Program, path: str) -> Callers:
    """Who may ask for an HTTP path; nobody when the table has no entry for it, nor for a folder above it."""
    routes = ROUTES[program]
    while path not in routes:
        path = path[: path.rstrip("/").rfind("/") + 1]
        if path in ("", "/"):
            return frozenset()
    return routes[path]


def known_to(program: Program) -> tuple[Identity, ...]:
    """The identities whose tokens this program must be able to tell: no more are made known to it."""
    named = frozenset().union(*METHODS.get(program, {}).values())
    return tuple(identity for identity in TOKENED if identity in named)
