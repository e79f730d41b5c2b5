"""`megatoken explain MODEL`: why a model has as many replicas as it has."""

from __future__ import annotations

import argparse

from megatoken.cluster.cli.common import add_cluster_arguments, connect
from megatoken.cluster.client.control import CommandError
from megatoken.cluster.view.autoscale import explanation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_cluster_arguments(parser)
    parser.add_argument("model", metavar="MODEL")


def run(arguments: argparse.Namespace) -> int:
    with connect(arguments) as client:
        models = client.status().models
    for model in models:
        if model.model == arguments.model:
            print(explanation(model))
            return 0
    known = ", ".join(model.model for model in models) or "none"
    raise CommandError(f"model: {arguments.model!r} is not allowed; one of: {known}", 2)
