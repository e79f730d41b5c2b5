"""Which replicas hold which prompt prefixes, as far as the router's own traffic tells. Pure.

A prompt is cut into blocks of BLOCK tokens; a block's hash covers everything before it too, so that holding block i
means holding the prompt up to there. What was sent to a replica counts as held until MOST newer blocks came, or the
replica was lost: bounded memory, and never a trie. Engines evict by their own rules; an estimate that is wrong costs a
prefill, not correctness.
"""

from __future__ import annotations

import hashlib
from typing import Final, Generic, Protocol, TypeVar

BLOCK: Final = 128  # tokens; shorter shared prefixes save too little prefill to give up balance for
MOST_HASHED: Final = 512  # blocks of one prompt: 65,536 tokens
MOST: Final = 16_384  # blocks a replica is thought to hold: two million tokens


class Holder(Protocol):
    """A replica, as far as this is concerned."""

    prefixes: dict[int, None]  # blocks that it holds, the oldest first
    open_at: int  # below 0: it takes no request now


Held = TypeVar("Held", bound=Holder)


def block_hashes(prompt: bytes, salt: str = "") -> tuple[int, ...]:
    """Chained 64-bit hashes of the prompt's whole blocks; `prompt` is the packed column. About 1 us a block."""
    size = BLOCK * 4
    chain = hashlib.blake2b(salt.encode(), digest_size=8)
    found = []
    for start in range(0, min(len(prompt) - size + 1, MOST_HASHED * size), size):
        chain.update(prompt[start : start + size])
        found.append(int.from_bytes(chain.copy().digest(), "little"))
    return tuple(found)


def cached_tokens(replica: Holder, hashes: tuple[int, ...]) -> int:
    """Leading tokens of the prompt that it holds. Holding block i means holding all before it: bisection."""
    low, high = 0, len(hashes)
    held = replica.prefixes
    while low < high:
        middle = (low + high) // 2
        if hashes[middle] in held:
            low = middle + 1
        else:
            high = middle
    return low * BLOCK


class PrefixIndex(Generic[Held]):
    """One for a model. `replica.prefixes` keeps each replica's blocks, the oldest first."""

    def __init__(self) -> None:
        self._holders: dict[int, list[Held]] = {}

    def __len__(self) -> int:
        return len(self._holders)

    def record(self, replica: Held, hashes: tuple[int, ...]) -> None:
        """The prompt was sent there. Its first blocks count as used last: they must outlive what builds on them."""
        held = replica.prefixes
        for block in reversed(hashes):
            if block in held:
                del held[block]
            else:
                self._holders.setdefault(block, []).append(replica)
            held[block] = None
        while len(held) > MOST:
            self._drop(replica, next(iter(held)))

    def forget(self, replica: Held) -> None:
        """The replica was lost; another process has an empty cache."""
        for block in list(replica.prefixes):
            self._drop(replica, block)

    def holders(self, hashes: tuple[int, ...], most: int) -> list[Held]:
        """Open replicas that hold the longest known prefix, at most `most`."""
        for block in reversed(hashes):
            holding = [replica for replica in self._holders.get(block, ())[: 4 * most] if replica.open_at >= 0]
            if holding:
                return holding[:most]
        return []

    def _drop(self, replica: Held, block: int) -> None:
        del replica.prefixes[block]
        holders = self._holders[block]
        holders.remove(replica)
        if not holders:
            del self._holders[block]
