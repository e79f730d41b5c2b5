"""Moves files between the nodes of a Ray cluster: one actor a node, and pieces through Ray's object store.

A piece is read once, on one node; the others' stores hand it on among themselves. Who calls it: fetch.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from megatoken.cluster.fetch.directory import ModelDirectory
from megatoken.cluster.fetch.plan import FetchError, FileContent, Transfer

PIECES = 4  # of a file on their way at once
STALLED_S = 120.0  # a disk that takes one piece no faster is not waited for
Report = Callable[[int], None]


@ray.remote(num_cpus=0, max_restarts=0, max_concurrency=1)
class FetchNode:
    """The hands of a fetch on one node."""

    def __init__(self, directories: Mapping[str, str] | None = None) -> None:
        """`directories`: where a directory lies on this node if it is elsewhere than on the others."""
        self._elsewhere = directories or {}
        self._directories: dict[str, ModelDirectory] = {}

    def held(self, path: str) -> tuple[dict[str, FileContent], dict[str, int], int]:
        """Files, parts, and free bytes."""
        directory = self._directory(path)
        return directory.files(), directory.parts(), directory.free_bytes()

    def read(self, path: str, name: str, offset: int, size: int) -> bytes:
        """Raises OSError where there is less."""
        data = self._directory(path).read(name, offset, size)
        if len(data) < size:
            raise OSError(f"{name} became shorter while it was read")
        return data

    def gives(self, path: str, name: str, offset: int, size: int) -> None:
        """Reads as `read` does, and raises what it raises."""
        self.read(path, name, offset, size)

    def write(self, path: str, name: str, content: FileContent, offset: int, data: bytes) -> int:
        return self._directory(path).write(name, content, offset, data)

    def _directory(self, path: str) -> ModelDirectory:
        if path not in self._directories:
            self._directories[path] = ModelDirectory(self._elsewhere.get(path, path))
        return self._directories[path]


@dataclass(frozen=True, slots=True)
class _Piece:
    offset: int
    size: int
    writes: Mapping[str, Any]
    """By node, under way."""


class Transfers:
    """Makes transfers of one directory. A node that fails is left out from then on, and its problem kept."""

    def __init__(self, directory: str, nodes: Mapping[str, Any], piece_bytes: int, report: Report) -> None:
        """`nodes`: FetchNode handles. `report` is told bytes as they are written."""
        self.problems: dict[str, str] = {}
        self._directory = directory
        self._nodes = nodes
        self._piece_bytes = piece_bytes
        self._report = report

    def run(self, transfer: Transfer) -> None:
        """Raises FetchError when no node is left that the file could come from."""
        had = dict(transfer.targets)
        for source in transfer.sources:
            had = {node: size for node, size in had.items() if node not in self.problems}
            if source not in self.problems and had and self._from(source, transfer, had):
                self.problems |= {
                    node: f"it has {size} of {transfer.content.size} bytes of {transfer.name}"
                    for node, size in had.items()
                    if node not in self.problems
                }
                return
        if any(node not in self.problems for node in had):
            raise FetchError(f"{self._directory}/{transfer.name}: no node is left to take it from")

    def _from(self, source: str, transfer: Transfer, had: dict[str, int]) -> bool:
        """Whether the source lasted; `had` grows."""
        pieces = self._pieces(source, transfer, had)
        under_way: deque[_Piece] = deque()
        while True:
            while len(under_way) < PIECES and (piece := next(pieces, None)) is not None:
                under_way.append(piece)
            if not under_way:
                return True
            piece = under_way.popleft()
            for node, reference in piece.writes.items():
                problem = self._written(node, reference, transfer, had)
                if problem and not self._gives(source, transfer.name, piece):
                    return False
                if problem:
                    self.problems[node] = problem

    def _pieces(self, source: str, transfer: Transfer, had: Mapping[str, int]) -> Iterator[_Piece]:
        """One after the other, asked for as it is taken. An empty file is one empty piece."""
        size, name = transfer.content.size, transfer.name
        first = dict(had)
        start = min(first.values())
        for offset in range(start, max(size, start + 1), self._piece_bytes):
            end = min(offset + self._piece_bytes, size)
            data = self._nodes[source].read.remote(self._directory, name, offset, end - offset)
            lacking = [node for node in first if node not in self.problems and (first[node] < end or end == size)]
            writes = {
                node: self._nodes[node].write.remote(self._directory, name, transfer.content, offset, data)
                for node in lacking
            }
            yield _Piece(offset, end - offset, writes)

    def _written(self, node: str, reference: Any, transfer: Transfer, had: dict[str, int]) -> str:
        """Takes in one write; what went wrong with it, or with the read that it waited for."""
        if node in self.problems or node not in had:
            return ""
        try:
            now = int(ray.get(reference, timeout=STALLED_S))
        except RayError as error:
            return _first_line(error)
        self._report(now - had[node])
        had[node] = now
        if now >= transfer.content.size:
            del had[node]
        return ""

    def _gives(self, source: str, name: str, piece: _Piece) -> bool:
        """Whether a source could give a piece, so that it is not to blame; else it is left out."""
        asked = self._nodes[source].gives.remote(self._directory, name, piece.offset, piece.size)
        try:
            ray.get(asked, timeout=STALLED_S)
        except RayError as error:
            self.problems[source] = _first_line(error)
            return False
        return True


def _first_line(error: RayError) -> str:
    """What went wrong on a node, without Ray's traceback."""
    cause = error.cause if isinstance(error, RayTaskError) and error.cause is not None else error
    text = str(cause).strip() or type(cause).__name__
    return text.splitlines()[0]
