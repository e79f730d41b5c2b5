"""The user's running clusters: a file each, mode 600, on how to reach it. `up` writes it, `down` removes it."""

from __future__ import annotations

import json
import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatoken.tls import ClientTls


class ClusterRecord(BaseModel):
    """How to reach a cluster, and who owns it."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    cluster: str
    control: str = Field(description="host:port of the controller")
    ray_address: str = ""
    guard_pid: int = Field(0, description="local clusters: the process whose end is the cluster's end")
    runtime_dir: str = ""
    tls: ClientTls | None = None


def record_path(directory: Path, cluster: str) -> Path:
    return directory / f"{cluster}.json"


def write_record(directory: Path, record: ClusterRecord) -> Path:
    """Writes the record, readable by its owner only; returns its path."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = record_path(directory, record.cluster)
    staged = path.with_suffix(".new")
    with open(os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        json.dump(record.model_dump(mode="json"), file, indent=1)
    staged.rename(path)
    return path


def read_records(directory: Path) -> list[ClusterRecord]:
    """Every cluster written down, by name; files that are none are passed over."""
    found = []
    for path in sorted(directory.glob("*.json")):
        try:
            found.append(ClusterRecord.model_validate_json(path.read_bytes()))
        except (OSError, ValidationError):
            continue
    return found


def alive(pid: int) -> bool:
    """Whether a process of that id runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
