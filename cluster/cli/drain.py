"""`megatoken drain replica ID | node NAME [--undo] [--timeout S]`."""

from __future__ import annotations

import argparse

from megatoken.cluster.cli.common import add_cluster_arguments, connect
from megatoken.v1 import control_pb2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_cluster_arguments(parser)
    parser.add_argument("kind", choices=("replica", "node"))
    parser.add_argument("name", help="id of the replica, or name, address or id of the node")
    parser.add_argument(
        "--timeout", type=float, metavar="SECONDS", help="what running requests get; default: the spec's"
    )
    parser.add_argument("--undo", action="store_true", help="nodes only: take it back into service")


def run(arguments: argparse.Namespace) -> int:
    request = control_pb2.DrainTargetRequest(undo=arguments.undo)
    setattr(request, arguments.kind, arguments.name)
    if arguments.timeout is not None:
        request.timeout_s = arguments.timeout
    with connect(arguments) as client:
        reply = client.drain(request)
    if arguments.undo:
        print(f"node {arguments.name} is back in service")
    else:
        print(f"{arguments.kind} {arguments.name} drains: {', '.join(reply.replicas) or 'no replica runs there'}")
    return 0
