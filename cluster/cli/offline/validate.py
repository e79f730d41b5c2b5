"""`megatoken validate -f spec.yaml`."""

from __future__ import annotations

import argparse

from megatoken.cluster.cli.common import read_text
from megatoken.cluster.planning.check import model_problems
from megatoken.cluster.spec.load import SpecError, dump_spec, load_spec


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", "--file", required=True, help="the spec, YAML; - reads standard input")
    parser.add_argument("--show", action="store_true", help="print the spec as it was understood")


def run(arguments: argparse.Namespace) -> int:
    spec = load_spec(read_text(arguments.file))
    problems = model_problems(spec)
    if problems:
        raise SpecError(problems)
    if arguments.show:
        print(dump_spec(spec), end="")
    replicas = sum(model.replicas for model in spec.models)
    print(f"valid: cluster {spec.cluster}, {len(spec.models)} models, {replicas} replicas on {spec.width} devices")
    return 0
