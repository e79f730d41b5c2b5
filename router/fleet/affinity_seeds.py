"""Hashes of names and keys for the affinity policy. Called when members change, and once a request with a key."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np


def seed_of(text: str) -> np.uint64:
    """The same in every process: routers beside each other send a key to the same replica."""
    return np.uint64(int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little"))
