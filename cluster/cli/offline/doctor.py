"""`megatoken doctor [-f spec.yaml] [--address HOST:PORT]`: checks every node before a launch."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

from megatoken.cluster.cli.common import ray_address, read_text
from megatoken.cluster.client.control import CommandError
from megatoken.cluster.doctor.examine import CannotExamine, examine, findings_of
from megatoken.cluster.doctor.judge import stops
from megatoken.cluster.doctor.text import findings_text
from megatoken.cluster.spec.cluster import default_spec
from megatoken.cluster.spec.load import load_spec


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", "--file", help="the spec to be launched; none: the embedded default")
    parser.add_argument("--address", help="HOST:PORT of a running Ray; none: the spec's ray.address or RAY_ADDRESS")
    parser.add_argument("--no-all-reduce", action="store_true", help="skip the measurement between pairs of nodes")
    parser.add_argument("--json", action="store_true", help="for programs")


def run(arguments: argparse.Namespace) -> int:
    """0: nothing would stop a launch; 1: something would."""
    spec = load_spec(read_text(arguments.file)) if arguments.file else default_spec()
    address = arguments.address or ray_address(spec)
    try:
        seen = examine(spec, address, reductions=not arguments.no_all_reduce, report=_report)
    except CannotExamine as error:
        raise CommandError(str(error)) from None
    findings = findings_of(spec, seen)
    if arguments.json:
        shown = {"stops": stops(findings), "findings": [dataclasses.asdict(finding) for finding in findings]}
        shown |= {"nodes": [dataclasses.asdict(node) for node in seen.nodes]}
        shown |= {"pairs": [dataclasses.asdict(pair) for pair in seen.pairs]}
        print(json.dumps(shown, indent=1))
    else:
        if address == "local":
            _report("no Ray cluster named: looking at this machine only")
        if seen.note:
            _report(seen.note)
        print(findings_text(findings))
    return 1 if stops(findings) else 0


def _report(line: str) -> None:
    print(f"doctor: {line}", file=sys.stderr)
