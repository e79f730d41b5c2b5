"""`megatoken status [--json]`."""

from __future__ import annotations

import argparse
import json

from megatoken.cluster.cli.common import add_cluster_arguments, connect
from megatoken.cluster.view.json import status_document
from megatoken.cluster.view.text import status_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_cluster_arguments(parser)
    parser.add_argument("--json", action="store_true", help="the stable form of docs/status-json.md")


def run(arguments: argparse.Namespace) -> int:
    with connect(arguments) as client:
        status = client.status()
    print(json.dumps(status_document(status), indent=2) if arguments.json else status_text(status))
    return 0
