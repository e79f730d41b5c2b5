"""The network environment of one node, worked out from its address on the node itself.

Why: Gloo, NCCL and RCCL each choose an interface by their own rules, and Gloo takes whatever the host name resolves to,
which is loopback on many machines. Ray hands the environment of `ray start` to every process on the node.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

AUTO = "auto"
LABELS = "--labels="
INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME")  # NCCL's is RCCL's too


class AddressError(ValueError):
    """No interface of this machine carries the address, or no route leads to the head."""


def node_environment(
    address: str, interface: str | None, interfaces: Mapping[str, tuple[str, ...]], inherited: Mapping[str, str]
) -> dict[str, str]:
    """What to add to the environment of `ray start`.

    `interfaces`: addresses by interface name. What the operator set already (`inherited`) stands. Raises AddressError
    when the address is not this machine's: the spec names another host, or a name that resolves elsewhere.
    """
    carrier = next((name for name, addresses in interfaces.items() if address in addresses), None)
    if carrier is None:
        known = "; ".join(f"{name} {' '.join(addresses)}" for name, addresses in sorted(interfaces.items()))
        raise AddressError(f"address: {address!r} is not allowed; this machine has: {known}")
    if interface is not None and interface not in interfaces:
        raise AddressError(f"interface: {interface!r} is not allowed; one of {', '.join(sorted(interfaces))}")
    wanted = {"VLLM_HOST_IP": address, **dict.fromkeys(INTERFACE_VARIABLES, interface or carrier)}
    return {name: value for name, value in wanted.items() if not inherited.get(name)}


def host_digest(address: str, directory: Path) -> str:
    """What stays of a node when its Ray starts again, which Ray itself gives another id. As a label, 12 characters."""
    return hashlib.sha256(f"{address} {directory}".encode()).hexdigest()[:12]


def with_label(command: Sequence[str], name: str, value: str) -> list[str]:
    """A `ray start` with one more node label; Ray takes the option once."""
    given = next((word for word in command if word.startswith(LABELS)), LABELS)
    others = given.removeprefix(LABELS)
    labels = f"{LABELS}{others},{name}={value}" if others else f"{LABELS}{name}={value}"
    return [*(word for word in command if word != given), labels]


def interface_addresses() -> dict[str, tuple[str, ...]]:
    """Addresses by interface, of this machine. IPv6 link-local zones are cut off."""
    import psutil  # type: ignore[import-untyped,unused-ignore]  # Ray brings it along

    families = (socket.AF_INET, socket.AF_INET6)
    return {
        name: tuple(entry.address.split("%")[0] for entry in entries if entry.family in families)
        for name, entries in psutil.net_if_addrs().items()
    }


def resolve_address(address: str, head: str | None) -> str:
    """An IP address for a name; for "auto", the address from which this machine reaches the head.

    Raises AddressError. No packet is sent: connecting a datagram socket only asks the routing table.
    """
    if address != AUTO:
        try:
            return str(socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)[0][4][0])
        except OSError as error:
            raise AddressError(f"address: {address!r} does not resolve: {error}") from None
    host, _, port = (head or "192.0.2.1:9").rpartition(":")  # 192.0.2.1: documentation range, so the default route
    try:
        family = socket.getaddrinfo(host, int(port), type=socket.SOCK_DGRAM)[0]
        with socket.socket(family[0], socket.SOCK_DGRAM) as probe:
            probe.connect(family[4])
            return str(probe.getsockname()[0])
    except (OSError, ValueError) as error:
        raise AddressError(f"address: no route to the head {head or ''}: {error}") from None
