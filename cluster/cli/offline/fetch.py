"""`megatoken fetch -f spec.yaml [--from NODE]`: the same weights on every node."""

from __future__ import annotations

import argparse

from megatoken.cluster.cli.common import ray_address, read_text
from megatoken.cluster.client.control import CommandError
from megatoken.cluster.client.progress import Progress
from megatoken.cluster.fetch.plan import FetchError, fetched_source
from megatoken.cluster.spec.load import load_spec
from megatoken.cluster.start.over_ssh import fetch_over_ssh, wants_ssh
from megatoken.cluster.view.human import gib


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-f", "--file", required=True, help="the spec whose models are meant: those with a directory or an id"
    )
    parser.add_argument("--address", help="HOST:PORT of a running Ray; none: the spec's ray.address or RAY_ADDRESS")
    parser.add_argument(
        "--from",
        dest="origin",
        default="",
        metavar="NODE",
        help="whose files are right where they differ",
    )


def run(arguments: argparse.Namespace) -> int:
    """0: every node has them; 1: some have not, and each says why."""
    spec = load_spec(read_text(arguments.file))
    sources = sorted({source for model in spec.models if (source := fetched_source(model))})
    if not sources:
        raise CommandError("models: none has a directory or a Hugging Face id as its source; nodes make the others", 2)
    if wants_ssh(spec) and not arguments.address:
        return fetch_over_ssh(spec, arguments.origin)
    address = arguments.address or ray_address(spec)
    if address == "local":
        raise CommandError(
            "ray.address: 'local' is not allowed; fetch copies between the nodes of a running Ray: name it with "
            "--address HOST:PORT, on one of its nodes",
            2,
        )
    from megatoken.cluster.fetch.fetch import fetch  # Ray takes a second to import

    try:
        found = fetch(sources, address, arguments.origin, Progress())
    except (FetchError, ConnectionError) as error:
        raise CommandError(str(error), 1) from None
    for one in found:
        copied = f"{gib(one.copied)} copied" if one.copied else "nothing to copy"
        print(f"{one.directory}: {one.files} files, {gib(one.size)}, on {one.nodes} nodes; {copied}")
        for node, text in one.problems.items():
            print(f"{one.directory}: node {node} has not all of it: {text}; fetch again, it goes on from there")
        for node, names in one.further.items():
            print(f"{one.directory}: node {node} has further files: {', '.join(names)}; remove them there")
    return 1 if any(one.problems for one in found) else 0
