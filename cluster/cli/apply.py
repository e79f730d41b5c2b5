"""`megatoken apply -f spec.yaml [--dry-run]`."""

from __future__ import annotations

import argparse

from megatoken.cluster.cli.common import add_cluster_arguments, connect, read_text
from megatoken.cluster.planning.check import model_problems
from megatoken.cluster.spec.load import SpecError, load_spec


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_cluster_arguments(parser)
    parser.add_argument("-f", "--file", required=True, help="the spec, YAML; - reads standard input")
    parser.add_argument("--dry-run", action="store_true", help="only say what would change")


def run(arguments: argparse.Namespace) -> int:
    text = read_text(arguments.file)
    spec = load_spec(text)
    problems = model_problems(spec)
    if problems:
        raise SpecError(problems)
    if arguments.cluster is None and arguments.control is None:
        arguments.cluster = spec.cluster
    with connect(arguments) as client:
        reply = client.apply(text, dry_run=arguments.dry_run)
    for change in reply.changes or ["nothing changes"]:
        print(f"would change: {change}" if arguments.dry_run and reply.changes else change)
    if not arguments.dry_run:
        print(f"generation {reply.generation}; follow it with `megatoken events --follow` or `megatoken status`")
    return 0
