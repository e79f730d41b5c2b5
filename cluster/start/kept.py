"""The spec of a cluster that was launched on machines from here, kept beside its record so that `down` knows them."""

from __future__ import annotations

import os
from pathlib import Path

from megatoken.cluster.client.records import forget
from megatoken.cluster.runtime_dirs import state_directory
from megatoken.cluster.spec.cluster import ClusterSpec
from megatoken.cluster.spec.load import dump_spec, load_spec


def keep(states: Path, spec: ClusterSpec) -> None:
    """Writes it; the state directory is there already."""
    _path(states, spec.cluster).write_text(dump_spec(spec))


def kept_spec(cluster: str) -> ClusterSpec | None:
    """The spec of a cluster that was launched from here over ssh or Slurm; None for any other."""
    try:
        return load_spec(_path(state_directory(os.environ), cluster).read_text())
    except FileNotFoundError:
        return None


def forget_launch(states: Path, cluster: str) -> None:
    """Removes it, and all else that is written down of the cluster."""
    forget(states, cluster)
    _path(states, cluster).unlink(missing_ok=True)


def _path(states: Path, cluster: str) -> Path:
    return states / f"{cluster}.launch.yaml"
