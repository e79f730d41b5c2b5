"""Reads the counter files of a node. Holds no descriptor between two ticks and maps nothing.

A file that another process truncates must not kill the reader, which a mapping would (SIGBUS). Headers are parsed once
a file; a tick costs an open, a read and a close for each.
"""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import numpy as np

from megatoken.counters import FILE_BYTES, HEADER_BYTES, read_counters
from megatoken.worker.throughput.decide.ledger import WIDTH, Totals, Writer

SUFFIX = ".counters"
LEDGER_FILE = "ledger.id"
MAX_FILES = 10_000  # read a tick; with more than that a file waits for its turn, and that is said


class CounterFiles:
    """The counter files in one directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._writers: dict[str, tuple[int, Writer]] = {}  # by file name: inode, header
        self._bad: dict[str, int] = {}
        self._tick = 0
        self._read_in: dict[str, int] = {}  # by file name: the last tick that read it
        self._crowded = False
        self.problems: list[str] = []  # sentences that the agent logs and clears

    def read(self) -> list[tuple[Writer, Totals]]:
        """(header, totals) of each readable file. A file that is none is named once in `problems`.

        Beyond MAX_FILES it takes those that were never read, then those unread for longest: the ledger keeps what a
        file said before, so one that waits counts a few ticks late, and none is left out.
        """
        try:
            names = sorted(entry.name for entry in os.scandir(self._directory) if entry.name.endswith(SUFFIX))
        except FileNotFoundError:
            return []
        crowded = len(names) > MAX_FILES
        if crowded and not self._crowded:
            self.problems.append(f"{self._directory}: {len(names)} counter files; {MAX_FILES} are read a tick, in turn")
        self._crowded = crowded
        self._tick += 1
        names = sorted(names, key=lambda name: self._read_in.get(name, 0))  # stable: among equals by name
        self._read_in = {name: self._read_in.get(name, 0) for name in names}
        del names[MAX_FILES:]
        self._read_in |= dict.fromkeys(names, self._tick)
        found = []
        for name in names:
            reading = self._read_one(name)
            if reading is not None:
                found.append(reading)
        return found

    def _read_one(self, name: str) -> tuple[Writer, Totals] | None:
        path = self._directory / name
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:  # removed since the listing
            return None
        try:
            inode = os.fstat(descriptor).st_ino
            content = os.pread(descriptor, FILE_BYTES + 1, 0)
        finally:
            os.close(descriptor)
        if self._bad.get(name) == inode:
            return None
        known = self._writers.get(name)
        try:
            if len(content) != FILE_BYTES:
                raise ValueError(f"{len(content)} bytes; a counter file has {FILE_BYTES}")
            if known is None or known[0] != inode:
                known = self._writers[name] = (inode, Writer.of_header(read_counters(path)[0]))
        except (ValueError, OSError) as error:
            self._bad[name] = inode
            self.problems.append(f"{path} is not counted: {error}")
            return None
        return known[1], np.frombuffer(content, np.int64, WIDTH, HEADER_BYTES)


def ledger_id(directory: Path) -> str:
    """The identity of the totals in this directory: made once, kept beside them.

    Others know a node's totals by it. A node that comes back with its files goes on where it was; one that lost them
    has a new identity, and what it counted before still counts.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / LEDGER_FILE
    try:
        kept = path.read_text().strip()
        if kept:
            return kept[:64]
    except FileNotFoundError:
        pass
    made = uuid.uuid4().hex
    staged = directory / f"{LEDGER_FILE}.{made}"
    staged.write_text(made + "\n")
    try:
        os.link(staged, path)  # fails when another agent was first
    except FileExistsError:
        made = path.read_text().strip()[:64]
    finally:
        staged.unlink()
    return made
