"""Where a cluster keeps what lives as long as it does, what must outlive a reboot, and who may write there.

Runtime files (configs, logs, counters, sockets) lie in the user's own runtime directory, or below /tmp. The state file
and the secrets lie below the user's state directory, since cleaners of /tmp would remove them from under a cluster that
runs for weeks. MEGATOKEN_RUNTIME_DIR holds both, which keeps a test or a second cluster in one place.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path

NODE_CHARS = 12  # of a name of a node: enough to tell nodes apart, short enough for socket paths
STATE_FILE = "controller.sqlite"
OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH


class UnsafeDirectory(OSError):
    """Somebody else could put files of theirs in the place of ours."""

    def __init__(self, path: Path, why: str) -> None:
        self.path = path
        super().__init__(
            f"{path}: {why}; a directory of yours that only you may write is needed. Remove it, or name another in "
            "MEGATOKEN_RUNTIME_DIR or MEGATOKEN_STATE_DIR"
        )


def make_private(path: Path) -> Path:
    """Makes a directory, and those above it, for this user alone; returns it.

    Below a directory like /tmp, where everybody may write, whatever lies on the way there is checked too: whoever owns
    one of them could exchange what is below. Raises UnsafeDirectory, or OSError when it cannot be made.
    """
    path = path.absolute()
    shared = next((above for above in path.parents if _shared(above)), None)
    for directory in (*reversed(path.parents), path):
        exists = directory.exists()
        if not exists:
            directory.mkdir(mode=0o700, exist_ok=True)  # whose it is, if somebody was faster, comes out below
        if not exists or directory == path or (shared is not None and shared in directory.parents):
            _require_private(directory)
    return path


def _require_private(directory: Path) -> None:
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise UnsafeDirectory(directory, "it is not a directory")
    if found.st_uid != os.geteuid():
        raise UnsafeDirectory(directory, f"it belongs to user {found.st_uid}")
    if found.st_mode & OTHERS_MAY_WRITE:
        raise UnsafeDirectory(directory, f"others may write there (mode {stat.S_IMODE(found.st_mode):o})")


def _shared(path: Path) -> bool:
    """Whether everybody may make files there, and nobody may move those of others."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return False
    return bool(mode & stat.S_ISVTX and mode & stat.S_IWOTH)


def runtime_root(env: Mapping[str, str], *, local: bool = True) -> Path:
    """The directory of all clusters' runtime directories. `local`: on this machine alone; other machines of a cluster
    have the user's runtime directory only while somebody is logged in there, so those use /tmp."""
    named = env.get("MEGATOKEN_RUNTIME_DIR")
    if named:
        return Path(named)
    given = env.get("XDG_RUNTIME_DIR")
    if local and given and _is_ours(Path(given)):
        return Path(given) / "megatoken"
    return Path(tempfile.gettempdir()) / f"megatoken-{os.getuid()}"


def _is_ours(path: Path) -> bool:
    """`sudo` passes on the runtime directory of whoever called it."""
    try:
        return path.stat().st_uid == os.geteuid()
    except OSError:
        return False


def cluster_directory(root: Path, cluster: str) -> Path:
    return root / cluster


def node_directory(root: Path, cluster: str, host: str) -> Path:
    """configs, logs and counters of one cluster on one node, by `Node.host`."""
    return root / cluster / host[:NODE_CHARS]


def state_directory(env: Mapping[str, str]) -> Path:
    """Where `up` writes down how to reach each cluster, for the other commands."""
    named = env.get("MEGATOKEN_STATE_DIR")
    if named:
        return Path(named)
    base = env.get("XDG_STATE_HOME") or Path(env.get("HOME") or Path.home()) / ".local" / "state"
    return Path(base) / "megatoken"


def controller_directory(env: Mapping[str, str], cluster: str) -> Path:
    """Where the controller keeps a cluster's state file and secrets; `env` is that of the machine it runs on."""
    named = env.get("MEGATOKEN_RUNTIME_DIR")
    if named:
        return cluster_directory(Path(named), cluster)
    return state_directory(env) / cluster


def state_path(env: Mapping[str, str], cluster: str) -> Path:
    """The state file of a cluster on its head node; the secrets lie beside it."""
    return controller_directory(env, cluster) / STATE_FILE
