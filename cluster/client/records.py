"""The user's running clusters: a file each, mode 600, on how to reach it. `up` writes it, `down` removes it."""

from __future__ import annotations

import json
import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatoken.access.files import write_private
from megatoken.cluster.runtime_dirs import make_private
from megatoken.tls import ClientTls


class ClusterRecord(BaseModel):
    """How to reach a cluster, and who owns it."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    cluster: str
    control: str = Field(description="host:port of the controller")
    ray_address: str = ""
    guard_pid: int = Field(0, description="local clusters: the process whose end is the cluster's end")
    slurm_job: int = Field(0, description="the Slurm job that the cluster is; 0: it is none")
    kubernetes: str = Field("", description="the Kubernetes namespace of its RayCluster; empty: it is none")
    runtime_dir: str = ""
    tls: ClientTls | None = None
    token_file: str = Field("", description="file of mode 600 with the operator's token; empty: none is known")


def record_path(directory: Path, cluster: str) -> Path:
    return directory / f"{cluster}.json"


def token_path(directory: Path, cluster: str) -> Path:
    """Where `up` keeps the operator's token of a cluster."""
    return directory / f"{cluster}.operator-token"


def forget(directory: Path, cluster: str) -> None:
    """Removes what is written down of a cluster that is gone."""
    for path in (record_path(directory, cluster), token_path(directory, cluster)):
        path.unlink(missing_ok=True)


def write_record(directory: Path, record: ClusterRecord) -> Path:
    """Writes the record, readable by its owner only; returns its path."""
    make_private(directory)
    path = record_path(directory, record.cluster)
    write_private(path, json.dumps(record.model_dump(mode="json"), indent=1))
    return path


def write_token(directory: Path, cluster: str, token: str) -> Path:
    """Keeps the operator's token of a cluster, readable by its owner only; returns its path."""
    make_private(directory)
    path = token_path(directory, cluster)
    write_private(path, token + "\n")
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
