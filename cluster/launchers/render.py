"""What each way of launching a cluster needs, as files. Pure; `megatoken render` writes them."""

from __future__ import annotations

from collections.abc import Callable

from megatoken.cluster.launchers.artefact import Artefact
from megatoken.cluster.launchers.compose import compose_artefacts
from megatoken.cluster.launchers.kuberay.manifest import kuberay_artefacts
from megatoken.cluster.launchers.slurm.job import slurm_artefacts
from megatoken.cluster.launchers.spec import LaunchSpec
from megatoken.cluster.launchers.ssh.script import ssh_artefacts
from megatoken.cluster.launchers.systemd import systemd_artefacts
from megatoken.cluster.spec.cluster import ClusterSpec

RENDERERS: dict[str, Callable[[ClusterSpec, LaunchSpec], list[Artefact]]] = {
    "ssh": ssh_artefacts,
    "systemd": systemd_artefacts,
    "slurm": slurm_artefacts,
    "kuberay": kuberay_artefacts,
    "compose": compose_artefacts,
}


def render(way: str, spec: ClusterSpec, launch: LaunchSpec) -> list[Artefact]:
    """The files for one way in. Raises ValueError when the spec's launch section does not describe it."""
    return RENDERERS[way](spec, launch)
