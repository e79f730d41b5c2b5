"""The process group of one epoch, in a process of its own that is killed when the epoch ends.

A collective blocks in native code when a peer is frozen or a link is cut, and neither gloo nor nccl promises to give up
in every such case. So no other process ever waits inside one: the agent talks to this process over a socket, with a
deadline of its own, and SIGKILL frees every thread, socket, group and device context that an epoch had.

Frames on the socket: length (uint32), one letter, payload.
  C  connect: JSON of Membership in the group        -> C
  G  greet: this rank's greeting                     -> G every rank's, each behind its length (uint32)
  R  reduce: timeout in seconds (float64), int64 ... -> R seconds it took (float64), the sums
  E  JSON {reason, suspects}: answer to any of them when it failed; the group is of no use any more
This module and `process_group` run in the child only; the agent uses `reducer_client`.
"""

from __future__ import annotations

import json
import socket
import struct
import time
from typing import Any, Final

import numpy as np

FRAME: Final = struct.Struct("=Ic")
SECONDS: Final = struct.Struct("=d")


def serve(channel: socket.socket, store_listener: int) -> None:
    """Answers the agent until it closes the channel. Runs in a fresh child of the fork server."""
    from megatoken.worker.throughput.reduce.process_group import CollectiveError, ProcessGroup

    group: ProcessGroup | None = None
    while True:
        kind, payload = receive(channel)
        if not kind:
            return
        try:
            if kind == b"C":
                group = ProcessGroup(json.loads(payload), store_listener)
                send(channel, b"C", b"")
            elif group is None:
                raise CollectiveError("no group is connected", "other")
            elif kind == b"G":
                send(channel, b"G", join_blobs(group.gather(payload)))
            else:
                send(channel, b"R", _reduce(group, payload))
        except CollectiveError as error:
            send(channel, b"E", json.dumps(error.facts()).encode())


def _reduce(group: Any, payload: bytes) -> bytes:
    (timeout_s,) = SECONDS.unpack_from(payload)
    started = time.perf_counter()
    sums = group.all_reduce(np.frombuffer(payload, np.int64, offset=SECONDS.size), timeout_s)
    return SECONDS.pack(time.perf_counter() - started) + sums.tobytes()


def send(channel: socket.socket, kind: bytes, payload: bytes) -> None:
    """Writes one frame."""
    channel.sendall(FRAME.pack(len(payload), kind) + payload)


def receive(channel: socket.socket) -> tuple[bytes, bytes]:
    """Reads one frame; (b"", b"") at the end."""
    head = _read(channel, FRAME.size)
    if len(head) < FRAME.size:
        return b"", b""
    length, kind = FRAME.unpack(head)
    payload = _read(channel, length)
    return (kind, payload) if len(payload) == length else (b"", b"")


def _read(channel: socket.socket, length: int) -> bytes:
    parts = bytearray()
    while len(parts) < length:
        part = channel.recv(min(length - len(parts), 1 << 20))
        if not part:
            break
        parts += part
    return bytes(parts)


def join_blobs(blobs: list[bytes]) -> bytes:
    """Each blob behind its length."""
    return b"".join(struct.pack("=I", len(blob)) + blob for blob in blobs)


def split_blobs(content: bytes) -> list[bytes]:
    """The inverse of join_blobs."""
    blobs, at = [], 0
    while at < len(content):
        (length,) = struct.unpack_from("=I", content, at)
        blobs.append(content[at + 4 : at + 4 + length])
        at += 4 + length
    return blobs
