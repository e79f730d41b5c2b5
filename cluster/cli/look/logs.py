"""`megatoken logs [NAME] [-n LINES] [--follow]`."""

from __future__ import annotations

import argparse

from megatoken.cluster.cli.common import add_cluster_arguments, connect


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_cluster_arguments(parser)
    parser.add_argument("name", nargs="?", default="", help="a replica or process of `status`; none: the controller")
    parser.add_argument("-n", "--lines", type=int, default=200, help="how many of the last lines")
    parser.add_argument("-f", "--follow", action="store_true", help="go on with new lines")


def run(arguments: argparse.Namespace) -> int:
    with connect(arguments) as client:
        for text in client.logs(arguments.name, max(1, arguments.lines), follow=arguments.follow):
            print(text, end="", flush=True)
    return 0
