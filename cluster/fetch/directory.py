"""A model's directory on this node: what it holds, what is read from it, and files that arrive in pieces.

A file arrives in a hidden part beside its place, is hashed as it comes, and takes its place when all of it is there and
has the hash that it should have: an engine never sees half a file, and what was cut off goes on where it stopped.

A model named by its Hugging Face id lies in the hub's cache of the node, in models--ORG--NAME: refs/main there names
the commit that is served, and snapshots/COMMIT has its files.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatoken.cluster.fetch.plan import HUB_FOLDER, REVISION, FileContent, part_name
from megatoken.worker.engines.weights import SNAPSHOTS, hashes_of, mark_of, remember
from megatoken.worker.models import notes_directory

READ_BYTES = 1 << 24


@dataclass(slots=True)
class _Incoming:
    file: IO[bytes]
    digest: Any
    size: int


class ModelDirectory:
    """One model's directory; the node may not have it yet. One caller at a time. Methods raise OSError."""

    def __init__(self, source: str, notes: Path | None = None) -> None:
        """`source`: as `fetched_source` has it."""
        self._path, self._revision = Path(source).expanduser(), ""
        if HUB_FOLDER in source:
            place, _, self._revision = source.rpartition(REVISION)
            self._path = Path(place).expanduser()
            if not self._path.is_absolute():
                from huggingface_hub.constants import HF_HUB_CACHE

                self._path = Path(HF_HUB_CACHE) / place
        self._notes = notes or notes_directory()
        self._incoming: dict[str, _Incoming] = {}
        self._outgoing: tuple[str, IO[bytes]] | None = None

    def files(self, report: Callable[[str], None] = lambda _name: None) -> dict[str, FileContent]:
        """Every file that is not hidden, by its path below the directory; `report` is told each that is hashed."""
        paths = {
            str(path.relative_to(self._path)): path
            for path in self._listed()
            if path.is_file() and not any(part.startswith(".") for part in path.relative_to(self._path).parts)
        }
        digests = hashes_of(self._path, paths, self._notes, report)
        return {name: FileContent(paths[name].stat().st_size, digest) for name, digest in digests.items()}

    def _listed(self) -> list[Path]:
        if not self._revision:
            return sorted(self._path.rglob("*"))
        ref = self._path / "refs" / self._revision
        commit = ref.read_text().strip() if ref.is_file() else self._revision
        return [ref, *sorted((self._path / SNAPSHOTS / commit).rglob("*"))]

    def parts(self) -> dict[str, int]:
        """Bytes of the parts that are there."""
        return {str(path.relative_to(self._path)): path.stat().st_size for path in self._path.rglob(".*.part")}

    def free_bytes(self) -> int:
        """Room on the file system that the directory is on, or will be."""
        there = next(path for path in (self._path, *self._path.absolute().parents) if path.exists())
        return shutil.disk_usage(there).free

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Bytes of a file from an offset on; fewer at its end."""
        if self._outgoing is None or self._outgoing[0] != name:
            if self._outgoing is not None:
                self._outgoing[1].close()
            self._outgoing = name, self._place(name).open("rb")
        self._outgoing[1].seek(offset)
        return self._outgoing[1].read(size)

    def write(self, name: str, content: FileContent, offset: int, data: bytes) -> int:
        """Adds what is new of `data`, which belongs at `offset`; returns how much of the file is there now.

        Takes nothing that would leave a gap. Raises ValueError for a whole file with another hash, and drops it.
        """
        incoming = self._incoming.get(name) or self._open(name, content)
        new = data[incoming.size - offset :] if offset <= incoming.size else b""
        try:
            incoming.file.write(new)
            incoming.file.flush()
        except OSError:  # the disk is full, say; what it took is hashed when the part is opened again
            self._incoming.pop(name)
            with contextlib.suppress(OSError):
                incoming.file.close()
            raise
        incoming.digest.update(new)
        incoming.size += len(new)
        if incoming.size >= content.size:
            self._finish(name, content, incoming)
        return incoming.size

    def _open(self, name: str, content: FileContent) -> _Incoming:
        part = self._place(part_name(name, content))
        part.parent.mkdir(parents=True, exist_ok=True)
        file = part.open("a+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise OSError(f"another fetch writes {name} on this node") from None
        if file.tell() > content.size:
            file.truncate(0)
        digest, size = hashlib.sha256(), 0
        file.seek(0)
        while piece := file.read(READ_BYTES):
            digest.update(piece)
            size += len(piece)
        self._incoming[name] = incoming = _Incoming(file, digest, size)
        return incoming

    def _finish(self, name: str, content: FileContent, incoming: _Incoming) -> None:
        del self._incoming[name]
        part, place = self._place(part_name(name, content)), self._place(name)
        with incoming.file as file:
            file.flush()
            os.fsync(file.fileno())
        found = incoming.digest.hexdigest()
        if found != content.sha256:
            part.unlink()
            raise ValueError(f"{name} arrived with SHA-256 {found[:12]}, not {content.sha256[:12]}; fetch again")
        part.replace(place)
        with contextlib.suppress(OSError):  # then it is hashed again when it is used
            remember(self._path, {name: (mark_of(place), found)}, self._notes)

    def _place(self, name: str) -> Path:
        place = self._path / name
        if not place.is_relative_to(self._path) or ".." in place.parts:
            raise ValueError(f"file: {name!r} is not allowed; a path below {self._path}")
        return place
