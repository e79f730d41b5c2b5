"""Finds ports for services whose port the spec leaves open. Asks the kernel; decides nothing else.

A port that is kept over restarts must not lie where the kernel takes source ports from: any outgoing connection of any
program could hold it just when its service comes back.
"""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Sequence
from pathlib import Path

LOWEST = 20_000  # below are registered services, and Ray's workers on 10002 to 19999
HIGHEST = 65_535
TRIES_A_PORT = 200
EPHEMERAL = (32_768, 60_999)  # Linux's default, where the kernel does not say
RANGE_FILE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def ephemeral_range(path: Path = RANGE_FILE) -> tuple[int, int]:
    """The first and last port that the kernel gives to outgoing connections."""
    try:
        low, high = (int(word) for word in path.read_text().split())
    except (OSError, ValueError):
        return EPHEMERAL
    return low, high


def candidates(ephemeral: tuple[int, int]) -> Sequence[int]:
    """The ports that may be kept. Pure. Empty where the kernel's range leaves none."""
    low, high = ephemeral
    return [*range(LOWEST, min(low, HIGHEST + 1)), *range(max(high + 1, LOWEST), HIGHEST + 1)]


def find_ports(count: int, host: str, rng: random.Random, ephemeral: tuple[int, int] | None = None) -> list[int]:
    """`count` different ports that are free on `host` now. Raises OSError when `host` is not an address of ours."""
    kept = candidates(ephemeral or ephemeral_range())
    found: list[int] = []
    with contextlib.ExitStack() as held:  # all at once, so that no port is found twice
        for _ in range(count):
            listener = held.enter_context(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET))
            _bind_one(listener, host, kept, rng)
            found.append(int(listener.getsockname()[1]))
    return found


def _bind_one(listener: socket.socket, host: str, kept: Sequence[int], rng: random.Random) -> None:
    for port in rng.sample(kept, min(TRIES_A_PORT, len(kept))):
        with contextlib.suppress(OSError):  # in use, or not ours: the last bind tells which
            listener.bind((host, port))
            return
    listener.bind((host, 0))  # nothing outside the kernel's range is free: better a port than none
