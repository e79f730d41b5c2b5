"""The format of a transcript, and its replay.

    # What this shows.
    command WORD key=value ...
    ----
    what came of it
    in as many lines as it took

A block is one or more commands, four dashes, and what they gave, up to an empty line. Replaying a file gives the same
text or the test fails; `python -m tests.transcripts` writes what comes of the commands now, to be read in the diff.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

DASHES = "----"


@dataclass(frozen=True, slots=True)
class Command:
    """`name words key=value ...`"""

    name: str
    words: tuple[str, ...]
    options: dict[str, str]

    @classmethod
    def of_line(cls, line: str) -> Command:
        name, *rest = shlex.split(line)
        options = dict(word.split("=", 1) for word in rest if "=" in word)
        return cls(name, tuple(word for word in rest if "=" not in word), options)

    def number(self, key: str, default: float = 0.0) -> float:
        return float(self.options.get(key, default))


Interpreter = Callable[[Command], list[str]]
"""Runs one command; returns what came of it, a line each."""


def replay(path: Path, interpreter: Interpreter) -> str:
    """The file's text with what comes of its commands now."""
    out: list[str] = []
    for comments, commands in blocks(path.read_text()):
        out += comments
        if commands:
            lines = [line for command in commands for line in interpreter(Command.of_line(command))]
            out += [*commands, DASHES, *(lines or ["(nothing)"])]
        out.append("")
    return "\n".join(out).rstrip("\n") + "\n"


def blocks(text: str) -> Iterator[tuple[list[str], list[str]]]:
    """(comments, commands) of each block; what they gave is left out."""
    comments: list[str] = []
    commands: list[str] = []
    answered = False
    for line in [*text.splitlines(), ""]:
        if not line.strip():
            if comments or commands:
                yield comments, commands
            comments, commands, answered = [], [], False
        elif answered:
            continue
        elif line == DASHES:
            answered = True
        elif line.startswith("#"):
            comments.append(line)
        else:
            commands.append(line)
