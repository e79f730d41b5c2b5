"""Arguments that commands share: which cluster is meant, and where a spec comes from."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from megatoken.cluster.client.control import TOKEN_VARIABLE, CommandError, ControlClient, choose, client_of
from megatoken.cluster.client.records import ClusterRecord
from megatoken.cluster.runtime_dirs import state_directory
from megatoken.cluster.spec.cluster import ClusterSpec


def add_cluster_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cluster", help="name of the cluster; not needed while only one runs")
    parser.add_argument("--control", metavar="HOST:PORT", help="address of a controller that was started elsewhere")
    parser.add_argument(
        "--token-file", metavar="FILE", help=f"the operator's token; unset: {TOKEN_VARIABLE}, or `up`'s"
    )


def chosen(arguments: argparse.Namespace) -> ClusterRecord:
    """The cluster that the arguments mean. Raises CommandError."""
    token_file = arguments.token_file or os.environ.get(TOKEN_VARIABLE)
    return choose(state_directory(os.environ), arguments.cluster, arguments.control, token_file)


def connect(arguments: argparse.Namespace) -> ControlClient:
    """A client of the meant cluster's controller. Raises CommandError."""
    return client_of(chosen(arguments))


def ray_address(spec: ClusterSpec) -> str:
    """Of the Ray that the spec or RAY_ADDRESS names; "local": none."""
    if spec.ray.address == "auto" or (spec.ray.address == "local" and os.environ.get("RAY_ADDRESS")):
        return os.environ.get("RAY_ADDRESS") or "auto"
    return spec.ray.address


def read_text(path: str) -> str:
    """A file's text, or standard input for "-". Raises CommandError."""
    try:
        return sys.stdin.read() if path == "-" else Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"-f: {path!r} cannot be read: {error}", 2) from None
