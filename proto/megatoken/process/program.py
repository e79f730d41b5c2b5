"""How a process of ours starts, says that it is ready, and ends with its owner.

Worker, router, edge and throughput agent are plain programs:

    python -m megatoken.worker --config FILE [--ready-fd N]

They read one JSON config, check it with pydantic, write one JSON line to the ready descriptor when they serve, and stop
on SIGTERM. A process whose parent dies is killed by the kernel (PR_SET_PDEATHSIG), so a `kill -9` anywhere in the tree
takes everything below it along.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any, TypeVar

import pydantic

from megatoken.process.tree import die_with_parent

Config = TypeVar("Config", bound=pydantic.BaseModel)


def read_arguments(program: str, config_type: type[Config]) -> tuple[Config, int | None]:
    """Parses the command line of a process of ours; returns its config and its ready descriptor.

    A config that does not fit exits with status 2 and one line per wrong field.
    """
    parser = argparse.ArgumentParser(prog=program)
    parser.add_argument("--config", required=True, type=Path, help="JSON file")
    parser.add_argument("--ready-fd", type=int, default=None, help="descriptor that gets one JSON line when serving")
    parser.add_argument("--orphan", action="store_true", help="keep running when the parent ends")
    arguments = parser.parse_args()
    if not arguments.orphan:
        die_with_parent()
    try:
        config = config_type.model_validate_json(arguments.config.read_bytes())
    except pydantic.ValidationError as error:
        for problem in error.errors():
            where = ".".join(str(part) for part in problem["loc"])
            print(f"{program}: {where}: {problem['msg']} (got {problem.get('input')!r})", file=sys.stderr)
        raise SystemExit(2) from None
    return config, arguments.ready_fd


def report_ready(ready_fd: int | None, **facts: Any) -> None:
    """Writes one JSON line to the ready descriptor and closes it; without one, prints the line."""
    line = json.dumps(facts, separators=(",", ":")) + "\n"
    if ready_fd is None:
        print(line, end="", flush=True)
        return
    with os.fdopen(ready_fd, "w") as pipe:
        pipe.write(line)
