"""`megatoken render ssh|systemd|slurm|kuberay|compose -f spec.yaml [-o DIRECTORY]`."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatoken.cluster.cli.common import read_text
from megatoken.cluster.client.control import CommandError
from megatoken.cluster.launchers.artefact import Artefact
from megatoken.cluster.launchers.load import launch_of
from megatoken.cluster.launchers.render import RENDERERS, render
from megatoken.cluster.spec.load import load_spec


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("way", choices=tuple(RENDERERS), help="how the machines are brought up")
    parser.add_argument("-f", "--file", required=True, help="the spec, YAML, with a launch section; - for stdin")
    parser.add_argument("-o", "--output", type=Path, help="directory to write to; none: print everything")


def run(arguments: argparse.Namespace) -> int:
    spec = load_spec(read_text(arguments.file))
    try:
        artefacts = render(arguments.way, spec, launch_of(spec.launch))
    except ValueError as error:
        raise CommandError(str(error), 2) from None
    if arguments.output is None:
        for artefact in artefacts:
            print(f"# ---- {artefact.name}\n{artefact.text}")
        return 0
    write(arguments.output, artefacts)
    return 0


def write(directory: Path, artefacts: list[Artefact]) -> None:
    """Writes the files and says which. Raises CommandError."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for artefact in artefacts:
            path = directory / artefact.name
            path.write_text(artefact.text)
            path.chmod(0o755 if artefact.executable else 0o644)
            print(path)
    except OSError as error:
        raise CommandError(f"-o: {str(directory)!r} cannot be written: {error.strerror}", 2) from None
