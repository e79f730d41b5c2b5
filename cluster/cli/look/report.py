"""`megatoken report [--since 1h] [--html FILE] [--price KIND=PER_HOUR ...]`."""

from __future__ import annotations

import argparse
import datetime
import re
from pathlib import Path

from megatoken.cluster.cli.common import add_cluster_arguments, connect
from megatoken.cluster.client.control import CommandError
from megatoken.cluster.view.report.page import report_page
from megatoken.cluster.view.report.summary import summary_of
from megatoken.cluster.view.report.text import report_text

UNITS = {"m": 60.0, "h": 3600.0, "d": 86_400.0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_cluster_arguments(parser)
    parser.add_argument("--since", default="1h", metavar="TIME", help="how far back: 30m, 1h, 7d (the most)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the page with plots as well")
    parser.add_argument(
        "--price", action="append", default=[], metavar="KIND=PER_HOUR", help="of one device, e.g. mi355x=4.2"
    )


def run(arguments: argparse.Namespace) -> int:
    seconds, prices = seconds_of(arguments.since), prices_of(arguments.price)
    with connect(arguments) as client:
        summary = summary_of(client.history(seconds), client.status(), seconds, prices)
    print(report_text(summary, _clock))
    if arguments.html is not None:
        try:
            arguments.html.write_text(report_page(summary, _clock))
        except OSError as error:
            raise CommandError(f"--html: {str(arguments.html)!r} cannot be written: {error.strerror}") from None
    return 0


def seconds_of(text: str) -> float:
    """90m as seconds. Raises CommandError."""
    found = re.fullmatch(r"(\d{1,6})([mhd])", text)
    if found is None or not int(found[1]):
        raise CommandError(f"--since: {text!r} is not allowed; a number and m, h or d, e.g. 90m", 2)
    return int(found[1]) * UNITS[found[2]]


def prices_of(texts: list[str]) -> dict[str, float]:
    """By device kind. Raises CommandError."""
    prices = {}
    for text in texts:
        kind, _, price = text.partition("=")
        if not kind or re.fullmatch(r"\d+(\.\d+)?", price) is None:
            raise CommandError(f"--price: {text!r} is not allowed; a device kind and a number, e.g. mi355x=4.2", 2)
        prices[kind] = float(price)
    return prices


def _clock(unix_s: float) -> str:
    return datetime.datetime.fromtimestamp(unix_s).strftime("%Y-%m-%d %H:%M")
