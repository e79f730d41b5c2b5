"""Where a cluster keeps what lives as long as it does, and where a user's clusters are written down."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

NODE_CHARS = 12  # of a Ray node id: enough to tell nodes apart, short enough for socket paths


def runtime_root(env: Mapping[str, str]) -> Path:
    """The directory of all clusters' runtime directories on this machine."""
    return Path(env.get("MEGATOKEN_RUNTIME_DIR") or Path(tempfile.gettempdir()) / f"megatoken-{os.getuid()}")


def cluster_directory(root: Path, cluster: str) -> Path:
    return root / cluster


def node_directory(root: Path, cluster: str, node_id: str) -> Path:
    """configs, logs and counters of one cluster on one node."""
    return root / cluster / node_id[:NODE_CHARS]


def state_directory(env: Mapping[str, str]) -> Path:
    """Where `up` writes down how to reach each cluster, for the other commands."""
    named = env.get("MEGATOKEN_STATE_DIR")
    if named:
        return Path(named)
    base = env.get("XDG_STATE_HOME") or Path(env.get("HOME") or Path.home()) / ".local" / "state"
    return Path(base) / "megatoken"
