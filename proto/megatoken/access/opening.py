"""Whether a program may open its door as configured: with a gate, or without where only this machine reaches it."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from pathlib import Path

from megatoken.access.files import CredentialsFile
from megatoken.access.gate import CallMetadata, Gate
from megatoken.access.table import Program
from megatoken.errors import RequestError


def gate_of(
    program: Program,
    credentials: CredentialsFile | None,
    host: str,
    *,
    unguarded: bool,
    certificates: bool,
    is_client: Callable[[CallMetadata], object] | None = None,
) -> Gate | None:
    """The gate of a server that binds `host`; None: everybody who reaches it may call it.

    Raises RequestError when that would be everybody on the network and nobody said that it is meant.
    """
    if credentials is not None:
        return Gate(program, credentials, is_client, certificates=certificates)
    if not unguarded and not is_loopback(host):
        allowed = f"a file, since others reach {host}; or unguarded: true, which lets everybody in"
        raise RequestError("credentials_file", None, allowed)
    return None


def credentials_of(path: Path | None) -> CredentialsFile | None:
    """Raises RequestError when the file cannot be used."""
    return CredentialsFile(path) if path is not None else None


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server bound to `host`."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
