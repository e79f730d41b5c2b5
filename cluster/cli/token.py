"""`megatoken token [--rotate]`: the operator's token of a cluster, for programs that speak gRPC themselves."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatoken.access.files import write_private
from megatoken.cluster.cli.common import add_cluster_arguments, chosen
from megatoken.cluster.client.control import CommandError, client_of, token_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_cluster_arguments(parser)
    parser.add_argument(
        "--rotate", action="store_true", help="make every token of the cluster anew; the old ones end a minute later"
    )


def run(arguments: argparse.Namespace) -> int:
    record = chosen(arguments)
    if not record.token_file:
        raise CommandError(f"no token of the cluster at {record.control} is known here; --token-file names one", 2)
    if not arguments.rotate:
        print(token_of(record))
        return 0
    with client_of(record) as client:
        write_private(Path(record.token_file), client.rotate_tokens() + "\n")
    print(f"every token of the cluster is new; the operator's is in {record.token_file}")
    return 0
