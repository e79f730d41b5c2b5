"""The network interface of an address, which Gloo and NCCL want by name."""

from __future__ import annotations

import socket


def interface_of(address: str) -> str:
    """The name of the interface of this machine that has an IP address; empty when none has."""
    import psutil  # Ray and vLLM bring it along

    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.family in (socket.AF_INET, socket.AF_INET6) and entry.address == address for entry in addresses):
            return str(name)
    return ""
