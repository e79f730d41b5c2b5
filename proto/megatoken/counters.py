"""Monotonic totals in a memory-mapped file, written by one process and read by others on the same node.

A worker and a router each keep one. The throughput agent of the node reads all of them once a tick; since the file
outlives its writer, tokens counted before a `kill -9` are not lost. Each total is an aligned int64 in the machine's own
byte order, so a reader never sees half a write.

Layout: magic (8 bytes), length of the JSON header (int64), header padded to HEADER_BYTES, then the totals in the order
of NAMES. The header says who writes: kind ("worker" or "router"), id, incarnation, model, engine, device_kind, devices.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from pathlib import Path
from typing import Any, Final

MAGIC: Final = b"mtcount2"
HEADER_BYTES: Final = 1024
NAMES: Final = (
    "prompt_tokens",
    "generated_tokens",
    "cached_tokens",
    "requests_started",
    "requests_finished",
    "requests_failed",
    "busy_us",
    "energy_mj",
    "made_tokens",
    "dropped_tokens",
)
INDEX: Final = {name: position for position, name in enumerate(NAMES)}
FILE_BYTES: Final = HEADER_BYTES + 8 * len(NAMES)


class CounterWriter:
    """Owns one counter file. `totals` is an int64 memoryview in the order of NAMES: `totals[INDEX[name]] += n`."""

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        encoded = json.dumps(header, separators=(",", ":")).encode()
        if len(encoded) > HEADER_BYTES - 16:
            raise ValueError(f"counter header of {len(encoded)} bytes; at most {HEADER_BYTES - 16} fit")
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_name(path.name + ".new")
        content = MAGIC + struct.pack("=q", len(encoded)) + encoded
        staged.write_bytes(content.ljust(FILE_BYTES, b"\0"))
        descriptor = os.open(staged, os.O_RDWR)
        try:
            self._map = mmap.mmap(descriptor, FILE_BYTES)
        finally:
            os.close(descriptor)
        staged.rename(path)  # a reader sees a whole file or none
        self.path = path
        self.totals = memoryview(self._map)[HEADER_BYTES:].cast("q")

    def close(self) -> None:
        """Unmaps the file and leaves it in place: its totals still count."""
        self.totals.release()
        self._map.close()


def read_counters(path: Path) -> tuple[dict[str, Any], tuple[int, ...]]:
    """(header, totals in the order of NAMES) of a counter file. Raises ValueError when it is not one."""
    content = path.read_bytes()
    if len(content) != FILE_BYTES or content[:8] != MAGIC:
        raise ValueError(f"{path}: not a counter file")
    (length,) = struct.unpack_from("=q", content, 8)
    header: dict[str, Any] = json.loads(content[16 : 16 + length])
    return header, struct.unpack_from(f"={len(NAMES)}q", content, HEADER_BYTES)
