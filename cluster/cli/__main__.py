"""The `megatoken` command: one module a command, imported when it is asked for.

A command module offers `add_arguments(parser)` and `run(arguments) -> exit status`. Errors for the user are
CommandError: one clear line each on stderr and a non-zero status. Status 2: the input is wrong; 1: anything else.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from types import ModuleType

from megatoken.cluster.client.control import CommandError
from megatoken.errors import MegatokenError

# name -> (module of this package, one line of help)
COMMANDS: dict[str, tuple[str, str]] = {
    "up": (
        "up",
        "start a cluster: a local one, or on the Ray that the spec or RAY_ADDRESS names",
    ),
    "fetch": ("offline.fetch", "put the weights of a spec's models on every node, from one that has them"),
    "apply": ("apply", "make a running cluster what a spec says"),
    "status": ("look.status", "show nodes, models, replicas with state and reason, queue, tokens/s"),
    "scale": ("scale", "change the number of a model's replicas: MODEL=N"),
    "generate": ("generate", "generate from a prompt through the router, over gRPC"),
    "explain": ("look.explain", "why a model has as many replicas as it has"),
    "drain": ("drain", "take a replica or a node out of service after its requests ended"),
    "cordon": ("cordon", "take one device out of service, or have it checked and taken back: NODE:DEVICE"),
    "logs": ("look.logs", "show what a process wrote"),
    "events": ("look.events", "show what changed, and why"),
    "top": ("look.top", "a live full-screen view"),
    "report": ("look.report", "one page on the last hours: tokens, efficiency, cost, failovers, starts; also as HTML"),
    "token": ("token", "print the operator's token, or make every token anew"),
    "down": ("down", "drain and stop a cluster"),
    "validate": ("offline.validate", "check a spec without touching anything"),
    "plan": ("offline.plan", "show where a spec's replicas would be placed, without touching anything"),
    "render": ("offline.render", "write launch artefacts for ssh, slurm, kuberay or compose"),
    "doctor": ("offline.doctor", "check every node before a launch"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    named = next((word for word in words if not word.startswith("-")), None)
    parser, module = build_parser(named)
    arguments = parser.parse_args(words)
    if module is None:
        parser.print_help()
        return 2
    try:
        status = module.run(arguments)
        sys.stdout.flush()
        return int(status or 0)
    except CommandError as error:
        return _complain(str(error), error.status)
    except MegatokenError as error:
        return _complain(str(error), 2)
    except BrokenPipeError:  # e.g. piped into head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130


def build_parser(command: str | None) -> tuple[argparse.ArgumentParser, ModuleType | None]:
    """The parser with the arguments of one command; only its module is imported."""
    parser = argparse.ArgumentParser(
        prog="megatoken", description="A distributed vLLM fleet on Ray behind a gRPC token router."
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    found: ModuleType | None = None
    for name, (module_name, text) in COMMANDS.items():
        if name == command:
            found = importlib.import_module(f"megatoken.cluster.cli.{module_name}")
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name == command and found is not None:
            found.add_arguments(sub)
    return parser, found


def _complain(text: str, status: int) -> int:
    for line in text.splitlines():
        print(f"megatoken: {line}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
