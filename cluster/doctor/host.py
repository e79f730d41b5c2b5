"""`python -m megatoken.cluster.doctor.host --address A`: prints this machine's facts as one line of JSON.

`megatoken up` runs it over ssh on every host before it starts anything there (ssh_hosts.py).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, replace
from typing import Any

from megatoken.cluster.doctor.facts import NodeFacts
from megatoken.cluster.doctor.probe import node_facts
from megatoken.cluster.launchers.node.environment import (
    AddressError,
    interface_addresses,
    node_environment,
    resolve_address,
)


def facts_of(printed: str, asked_s: float, answered_s: float) -> NodeFacts:
    """What `main` printed on a host, between two readings of this machine's clock. Raises ValueError."""
    read: dict[str, Any] = json.loads(printed)
    read = {name: tuple(value) if isinstance(value, list) else value for name, value in read.items()}
    offset = read.pop("now") - (asked_s + answered_s) / 2
    return NodeFacts(**{**read, "clock_offset_s": offset, "clock_error_s": (answered_s - asked_s) / 2})


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--address", required=True, help="the host's address or name in the cluster")
    parser.add_argument("--interface", help="that Gloo and NCCL are told to use; none: the one with the address")
    parser.add_argument("--gpus", type=int, help="that Ray will be told of; none: all that the driver shows")
    parser.add_argument("--source", action="append", default=[], help="a model directory that must be here")
    parser.add_argument("--port", type=int, action="append", default=[], help="a port that must be free here")
    asked = parser.parse_args()
    try:
        address = resolve_address(asked.address, None)
        node_environment(address, asked.interface, interface_addresses(), {})
    except AddressError as error:
        print(error, file=sys.stderr)
        return 2
    facts = node_facts(asked.address, address, sources=asked.source, ports=asked.port, before_ray=True)
    facts = replace(facts, expected_gpus=facts.accelerators if asked.gpus is None else asked.gpus)
    print(json.dumps({**asdict(facts), "now": time.time()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
