"""Which members of a broken group this node cannot reach: one TCP connection to each one's store port.

Every agent reserves that port for as long as it lives, whether or not it serves a store, so a refused or unanswered
connection is a dead agent or a cut link. A frozen one is still answered by its kernel; its silence towards the
controller shows it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

TIMEOUT_S: Final = 0.3
MAX_PROBED: Final = 64  # of a large group the ranks after ours: everyone is probed by others


async def unreachable(addresses: Sequence[str], own: int) -> set[int]:
    """Ranks whose address does not accept a connection within TIMEOUT_S; `own` is -1 outside the group."""
    size = len(addresses)
    ranks = [(own + step) % size for step in range(1, min(size, MAX_PROBED) + 1)]
    ranks = [rank for rank in ranks if rank != own]
    answers = await asyncio.gather(*(_reaches(addresses[rank]) for rank in ranks))
    return {rank for rank, reached in zip(ranks, answers, strict=True) if not reached}


async def _reaches(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        async with asyncio.timeout(TIMEOUT_S):
            _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    except (OSError, TimeoutError):
        return False
    writer.transport.abort()
    return True
