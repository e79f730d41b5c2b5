"""`megatoken events [--follow] [--json]`."""

from __future__ import annotations

import argparse
import datetime
import json

from google.protobuf import json_format

from megatoken.cluster.cli.common import add_cluster_arguments, connect
from megatoken.v1 import control_pb2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_cluster_arguments(parser)
    parser.add_argument("-f", "--follow", action="store_true", help="go on with new events")
    parser.add_argument("--after", type=int, default=0, metavar="SEQUENCE", help="only events after this number")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")


def run(arguments: argparse.Namespace) -> int:
    with connect(arguments) as client:
        for event in client.events(max(0, arguments.after), follow=arguments.follow):
            print(event_json(event) if arguments.json else event_text(event), flush=True)
    return 0


def event_text(event: control_pb2.Event) -> str:
    """One event as a line for people."""
    at = datetime.datetime.fromtimestamp(event.unix_s).strftime("%H:%M:%S")
    cause = f"  ({event.cause})" if event.cause else ""
    return f"{at}  {event.kind:16}  {event.subject}: {event.message}{cause}"


def event_json(event: control_pb2.Event) -> str:
    """One event as a line of JSON; `sequence` is a number."""
    document = json_format.MessageToDict(
        event, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return json.dumps({**document, "sequence": event.sequence})
