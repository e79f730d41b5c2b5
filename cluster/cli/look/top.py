"""`megatoken top`: the live full-screen view, or one picture of it as an SVG."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import cast

import grpc

from megatoken.access.channel import presenting
from megatoken.cluster.cli.common import add_cluster_arguments, chosen
from megatoken.cluster.client.control import CommandError, shown, token_of
from megatoken.cluster.view.top.run import SCREENSHOT_SIZE, run_top, save_top
from megatoken.tls import open_channel

SIZE_LIMITS = ((60, 15), (400, 200))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_cluster_arguments(parser)
    parser.add_argument("--svg", type=Path, metavar="FILE", help="write one picture instead of showing the view")
    parser.add_argument("--after", type=float, default=15.0, metavar="SECONDS", help="with --svg: watch first")
    parser.add_argument(
        "--size", default="x".join(map(str, SCREENSHOT_SIZE)), metavar="COLUMNSxROWS", help="with --svg: of the picture"
    )


def run(arguments: argparse.Namespace) -> int:
    record = chosen(arguments)
    present = shown(token_of(record))

    def open_to(address: str) -> grpc.aio.Channel:
        return cast(grpc.aio.Channel, presenting(open_channel(address, record.tls), present))

    if arguments.svg is not None:
        size = parse_size(arguments.size)
        if not 0 <= arguments.after <= 3600:
            raise CommandError(f"--after: {arguments.after} is not allowed; 0 to 3600 seconds", 2)
        save_top(record.control, open_to, arguments.svg, arguments.after, size)
        print(f"wrote {arguments.svg}")
        return 0
    if not sys.stdout.isatty():
        raise CommandError("standard output is no terminal; use `megatoken status`, or --svg FILE for a picture", 2)
    run_top(record.control, open_to)
    return 0


def parse_size(text: str) -> tuple[int, int]:
    """ "100x30" -> (100, 30). Raises CommandError."""
    columns, _, rows = text.partition("x")
    low, high = SIZE_LIMITS
    if columns.isdigit() and rows.isdigit():
        size = (int(columns), int(rows))
        if low[0] <= size[0] <= high[0] and low[1] <= size[1] <= high[1]:
            return size
    raise CommandError(f"--size: {text!r} is not allowed; COLUMNSxROWS from 60x15 to 400x200", 2)
