"""Marks a process as a part of a replica, so that whoever looks for the part that hangs finds it.

The mark is an open memfd whose name says replica and part: /proc/PID/fd shows it to the same user, it ends with the
process, and unlike a title or an environment it cannot be overwritten (Ray sets titles, vLLM environments). Linux only.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

PREFIX: Final = "megatoken:"
_marks: Final[list[int]] = []  # the descriptor of this process's mark
STATES: Final = {"T": "stopped", "t": "stopped by a debugger", "Z": "dead", "D": "waiting for a device or a disk"}


@dataclass(frozen=True, slots=True)
class TaggedProcess:
    """One process of a replica."""

    part: str  # "worker", "engine", "rank 1"
    pid: int
    state: str  # one of STATES' values; empty: it runs, or could


def replica_tag(cluster_directory: Path, replica: str) -> str:
    """The mark of a replica of the cluster that keeps its files there: other clusters here may have one of its name."""
    return f"{hashlib.sha256(str(cluster_directory).encode()).hexdigest()[:8]}-{replica}"


def tag_process(replica: str, part: str) -> None:
    """Marks this process until it is marked anew or ends; what it forks is marked "engine" in its place."""
    if not _marks:
        os.register_at_fork(after_in_child=lambda: tag_process(replica, "engine"))
    while _marks:
        os.close(_marks.pop())
    _marks.append(os.memfd_create(_name(replica, part), os.MFD_CLOEXEC))


def tagged_processes(replica: str, proc: Path = Path("/proc")) -> list[TaggedProcess]:
    """This user's processes on this machine that are parts of the replica, by part."""
    prefix = f"/memfd:{_name(replica, '')}"
    found = []
    for entry in proc.iterdir():
        if entry.name.isdigit():
            try:
                links = [os.readlink(link) for link in (entry / "fd").iterdir()]
                part = next((link for link in links if link.startswith(prefix)), None)
                if part is not None:
                    state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                    name = part.removeprefix(prefix).removesuffix(" (deleted)")
                    found.append(TaggedProcess(name, int(entry.name), STATES.get(state, "")))
            except OSError:  # it ended meanwhile, or is somebody else's
                continue
    return sorted(found, key=lambda process: (process.part, process.pid))


def _name(replica: str, part: str) -> str:
    return f"{PREFIX}{replica}:{part}"
