"""`megatoken cordon NODE:DEVICE [--reason TEXT] [--undo]`."""

from __future__ import annotations

import argparse

from megatoken.cluster.cli.common import add_cluster_arguments, connect
from megatoken.cluster.client.control import CommandError
from megatoken.v1 import control_pb2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_cluster_arguments(parser)
    parser.add_argument("device", metavar="NODE:DEVICE", help="name, address or id of the node, and a device's number")
    parser.add_argument("--reason", default="", help="what status says of it")
    parser.add_argument("--undo", action="store_true", help="check the device, and take it back if it is well")


def run(arguments: argparse.Namespace) -> int:
    node, colon, device = arguments.device.rpartition(":")
    if not node or not colon or not device.isdecimal():
        raise CommandError(f"NODE:DEVICE: {arguments.device!r} is not allowed; e.g. gpu-03:5", 2)
    request = control_pb2.CordonRequest(node=node, device=int(device), reason=arguments.reason, undo=arguments.undo)
    with connect(arguments) as client:
        reply = client.cordon(request)
    if arguments.undo:
        print(f"device {arguments.device} is being checked; `megatoken events` says whether it is taken back")
    else:
        drained = ", ".join(reply.replicas) or "no replica runs there"
        print(f"device {arguments.device} is cordoned; these drain: {drained}")
    return 0
