"""Which model a directory holds, by content: no two nodes may serve different weights under one name.

A manifest is the SHA-256 of each file that an engine reads, by file name. Where the directory has a SHA256SUMS, as
`sha256sum` writes it, its files must be those. Each file is hashed once a node: notes keep the result by size and
time of the file. A snapshot in the hub's cache holds what was needed of it so far, so that of two of them the commit
and the files that both have must be the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from megatoken.errors import RequestError

SUMS: Final = "SHA256SUMS"
SUFFIXES: Final = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".json", ".model")
VARIABLE: Final = "MEGATOKEN_WEIGHTS"  # to ranks on other nodes: JSON {"files": manifest, "whose": text}
SNAPSHOTS: Final = "snapshots"  # the hub's cache keeps a commit's files in models--ORG--NAME/snapshots/COMMIT
COMMIT: Final = "commit"  # in the manifest of a snapshot, beside its files
SHOWN: Final = 12  # hex digits of a hash in a message
THREADS: Final = 8

Manifest = Mapping[str, str]
"""SHA-256 in hex by file name."""


def manifest_of(directory: Path, notes: Path, report: Callable[[str], None] = lambda _name: None) -> dict[str, str]:
    """Of what is in the directory. Raises OSError."""
    files = {path.name: path for path in directory.iterdir() if path.suffix in SUFFIXES and path.is_file()}
    found = hashes_of(directory, files, notes, report)
    return {COMMIT: directory.name, **found} if directory.parent.name == SNAPSHOTS else found


def hashes_of(
    directory: Path, files: Mapping[str, Path], notes: Path, report: Callable[[str], None] = lambda _name: None
) -> dict[str, str]:
    """Hashes what the directory's notes do not have; `report` is told each file that it was. Raises OSError."""
    known = _read_notes(_notes_file(notes, directory))
    marks = {name: mark_of(path) for name, path in files.items()}
    found = {name: known[name][1] for name, mark in marks.items() if known.get(name, ("",))[0] == mark}
    stale = {name: path for name, path in files.items() if name not in found}
    if stale:
        with ThreadPoolExecutor(THREADS) as pool:
            for name, digest in zip(stale, pool.map(sha256_of, stale.values()), strict=True):
                report(name)
                found[name] = digest
        with contextlib.suppress(OSError):  # then they are hashed again next time
            remember(directory, {name: (marks[name], found[name]) for name in stale}, notes)
    return dict(sorted(found.items()))


def remember(directory: Path, hashed: Mapping[str, tuple[str, str]], notes: Path) -> None:
    """Adds files of the directory to its notes: (mark, hash) by name. Raises OSError."""
    path = _notes_file(notes, directory)
    known = {**_read_notes(path), **hashed}
    notes.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f"{path.name}.{os.getpid()}")
    staged.write_text(json.dumps(known))
    staged.rename(path)


def sha256_of(path: Path) -> str:
    """Of one file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sums(directory: Path, found: Manifest) -> None:
    """Raises RequestError for a file that is not as the directory's own SHA256SUMS has it."""
    try:
        lines = (directory / SUMS).read_text().splitlines()
    except FileNotFoundError:
        return
    pairs = [(digest.lower(), name.lstrip("*")) for digest, _, name in (line.partition(" ") for line in lines)]
    sums = {name.strip(): digest for digest, name in pairs if name.strip().endswith(SUFFIXES)}
    wrong = difference({name: found.get(name, "") for name in sums}, sums)
    if wrong is not None:
        raise RequestError("weights", str(directory / wrong), _rule(wrong, found, sums, f"the directory's {SUMS}"))


def check_same(directory: str, found: Manifest, expected: Manifest, whose: str) -> None:
    """Raises RequestError for the first file that differs from what `whose` (a phrase) has."""
    if COMMIT in found and COMMIT in expected:
        both = found.keys() & expected.keys()
        found, expected = ({name: one[name] for name in both} for one in (found, expected))
    wrong = difference(found, expected) if expected else None
    if wrong is not None:
        raise RequestError("weights", f"{directory}/{wrong}", _rule(wrong, found, expected, whose))


def difference(found: Manifest, expected: Manifest) -> str | None:
    """The first file, by name, that is not in both or has another content."""
    return next((name for name in sorted({*found, *expected}) if found.get(name) != expected.get(name)), None)


def _rule(name: str, found: Manifest, expected: Manifest, whose: str) -> str:
    kind = "commit" if name == COMMIT else "SHA-256"
    here = f"{kind} {found[name][:SHOWN]}" if found.get(name) else "missing"
    there = f"{kind} {expected[name][:SHOWN]}" if name in expected else "no such file"
    return f"{whose} has {there}, here it is {here} on {os.uname().nodename}"


def mark_of(path: Path) -> str:
    """What changes when a file does."""
    status = path.stat()
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ino}"


def _read_notes(path: Path) -> dict[str, tuple[str, str]]:
    try:
        return {name: (mark, digest) for name, (mark, digest) in json.loads(path.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):  # none, or damaged: everything is hashed again
        return {}


def _notes_file(notes: Path, directory: Path) -> Path:
    return notes / f"{hashlib.sha256(str(directory).encode()).hexdigest()[:16]}.json"
