"""What each way of launching a cluster needs, as files. Pure; `megatoken render` writes them."""

from __future__ import annotations

from collections.abc import Callable

from cluster.launchers.artefact import Artefact
from cluster.launchers.compose import compose_artefacts
from cluster.launchers.kuberay import kuberay_artefacts
from cluster.launchers.launch_spec import LaunchSpec
from cluster.launchers.slurm import slurm_artefacts
from cluster.launchers.ssh_script import ssh_artefacts
from cluster.launchers.systemd import systemd_artefacts
from cluster.spec import ClusterSpec

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
