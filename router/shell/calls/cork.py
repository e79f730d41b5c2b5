"""Lets the tokens of many Generate calls on one connection leave in one segment.

gRPC makes a system call for every message of every call, and on a busy connection that is the larger half of a token's
cost, for the receiver too. While TCP_CORK is set the kernel gathers them; it is cleared in the loop's next turn,
and by the kernel itself after 200 ms whatever happens. gRPC gives no access to its sockets, so the connection is found
among this process's descriptors by its peer; where that fails nothing is corked. Linux only, and no more than a saving.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import socket
import stat
import sys
from typing import Final

MAX_KNOWN: Final = 4096  # connections whose descriptor is remembered
_TCP_CORK: Final = 3  # linux/tcp.h


class Connection:
    """One peer's connection and how many calls it has now."""

    __slots__ = ("calls", "corked", "descriptor", "peer")

    def __init__(self, peer: str) -> None:
        self.peer = peer
        self.calls = 0
        self.descriptor = -1  # not looked for, or not found
        self.corked = False


class Corks:
    """One for the process; `join` and `leave` around each call, `hold` before writing to it."""

    def __init__(self) -> None:
        self._connections: dict[str, Connection] = {}
        self._known: dict[str, int] = {}  # descriptors of connections seen before, the latest last
        self._held: list[Connection] = []
        self._libc = ctypes.CDLL(None) if sys.platform == "linux" else None
        self._on, self._off = ctypes.c_int(1), ctypes.c_int(0)

    def join(self, peer: str) -> Connection:
        """A call of this peer begins. Its socket is looked for at the second call at a time, and only once."""
        connection = self._connections.get(peer)
        if connection is None:
            connection = self._connections[peer] = Connection(peer)
        connection.calls += 1
        if connection.calls == 2 and self._libc is not None:
            connection.descriptor = self._descriptor_of(peer)
        return connection

    def _descriptor_of(self, peer: str) -> int:
        """Looked for among all descriptors once a connection; after that it is only made sure that it is still it."""
        known = self._known.pop(peer, None)
        if known is None or (known >= 0 and not is_connection_of(known, peer)):
            known = find_socket(peer)
        self._known[peer] = known
        if len(self._known) > MAX_KNOWN:
            del self._known[next(iter(self._known))]
        return known

    def leave(self, connection: Connection) -> None:
        connection.calls -= 1
        if not connection.calls:
            del self._connections[connection.peer]

    def hold(self, connection: Connection) -> None:
        """Corks the connection until the loop's next turn."""
        if connection.corked or connection.descriptor < 0:
            return
        connection.corked = True
        self._set(connection, self._on)
        if not self._held:
            asyncio.get_running_loop().call_soon(self._release)
        self._held.append(connection)

    def _release(self) -> None:
        held, self._held = self._held, []
        for connection in held:
            connection.corked = False
            self._set(connection, self._off)

    def _set(self, connection: Connection, value: ctypes.c_int) -> None:
        if self._libc is not None and self._libc.setsockopt(
            connection.descriptor, socket.IPPROTO_TCP, _TCP_CORK, ctypes.byref(value), ctypes.sizeof(value)
        ):
            connection.descriptor = -1  # closed meanwhile


def find_socket(peer: str) -> int:
    """The descriptor of the connection from `peer`, as gRPC writes it (ipv4:127.0.0.1:1234); -1 when none is found."""
    if _host_and_port(peer) is None:
        return -1
    return next((found for name in os.listdir("/proc/self/fd") if is_connection_of(found := int(name), peer)), -1)


def is_connection_of(descriptor: int, peer: str) -> bool:
    """Whether this descriptor is, now, the TCP connection from `peer`."""
    wanted = _host_and_port(peer)
    with contextlib.suppress(OSError):
        if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            return False
        with socket.socket(fileno=os.dup(descriptor)) as probe:
            if probe.family not in (socket.AF_INET, socket.AF_INET6) or probe.type != socket.SOCK_STREAM:
                return False
            found = probe.getpeername()
            return (found[0].removeprefix("::ffff:"), found[1]) == wanted
    return False


def _host_and_port(peer: str) -> tuple[str, int] | None:
    kind, _, address = peer.partition(":")
    host, _, port = address.rpartition(":")
    if kind not in ("ipv4", "ipv6") or not port.isdigit():
        return None
    return host.strip("[]").replace("%5B", "").replace("%5D", "").removeprefix("::ffff:"), int(port)
