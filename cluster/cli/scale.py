"""`megatoken scale MODEL=N [--wait | --dry-run]`."""

from __future__ import annotations

import argparse

from megatoken.cluster.cli.common import add_cluster_arguments, connect
from megatoken.cluster.client.control import CommandError
from megatoken.cluster.client.progress import last_event, wait_until_settled

MAX_REPLICAS = 100_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_cluster_arguments(parser)
    parser.add_argument("target", metavar="MODEL=N", help="the model and how many replicas it shall have")
    parser.add_argument("--wait", action="store_true", help="until that many replicas serve, showing progress")
    parser.add_argument("--dry-run", action="store_true", help="say what would happen, and change nothing")
    parser.add_argument("--timeout", type=float, default=900.0, metavar="SECONDS", help="limit on --wait")


def run(arguments: argparse.Namespace) -> int:
    model, sign, text = arguments.target.rpartition("=")
    if not sign or not model or not text.isdigit() or int(text) > MAX_REPLICAS:
        raise CommandError(f"{arguments.target!r} is not allowed; MODEL=N with N from 0 to {MAX_REPLICAS}", 2)
    with connect(arguments) as client:
        if arguments.dry_run:
            changes = client.scale(model, int(text), dry_run=True).changes
            print("\n".join(changes) or f"model {model}: nothing would change")
            return 0
        before = last_event(client)
        reply = client.scale(model, int(text))
        print(f"model {model}: {int(text)} replicas wanted (generation {reply.generation})")
        if arguments.wait:
            wait_until_settled(client, timeout_s=arguments.timeout, after=before)
    return 0
