"""The head's control store (Ray's GCS) where its data lie in Redis: it is started again alone, while all else goes on.

`ray start --block` ends every process of a node when one of them dies. Without --block it leaves them to the
supervisor, which looks after the two that matter: the raylet, whose end is the node's, and the store, which comes back
by the same command line and reads from Redis what it knew. Linux.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import select
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatoken.backoff import doubling_pause_s
from megatoken.process.tree import descendants, reap_orphans

ADDRESS = "RAY_REDIS_ADDRESS"  # Ray's own names for where Redis is, and for what a cluster's keys there begin with
NAMESPACE = "RAY_external_storage_namespace"
RAYLET, STORE = "raylet", "gcs_server"  # as the kernel names the processes
REAP_S = 0.5
# Other nodes wait for the store for as long as RAY_gcs_rpc_server_reconnect_timeout_s (5 s) before they end.
RESTART_S, RESTART_MAX_S = 0.1, 5.0
SETTLED_S = 60.0


class NotRunning(RuntimeError):
    """A process that must run does not."""


@dataclass(frozen=True, slots=True)
class RunningProgram:
    """A running process, and how to start the same again."""

    pid: int
    argv: tuple[str, ...]
    env: Mapping[str, str]


def outlives(env: Mapping[str, str]) -> bool:
    """Whether a store that is started again knows what the one before it knew."""
    return bool(env.get(ADDRESS))


def namespaced(env: Mapping[str, str]) -> dict[str, str]:
    """The environment with a prefix for this cluster's keys, unless there is one: a new token is a new cluster."""
    token = Path(env["RAY_AUTH_TOKEN_PATH"]).read_text() if env.get("RAY_AUTH_TOKEN_PATH") else ""
    token = env.get("RAY_AUTH_TOKEN") or token
    return {NAMESPACE: f"megatoken-{hashlib.sha256(token.strip().encode()).hexdigest()[:16]}", **env}


def watch() -> int:
    """Until this node's raylet ends; a store that ends is started again, with pauses. A signal interrupts.

    Raises NotRunning when either is not below this process.
    """
    raylet, store, failures = _below(RAYLET), _below(STORE), 0
    while True:
        began_s = time.monotonic()
        if _first_to_end(raylet.pid, store.pid) == raylet.pid:
            print("megatoken node: the raylet ended", flush=True)
            return 1
        failures = 1 if time.monotonic() - began_s >= SETTLED_S else failures + 1
        pause_s = doubling_pause_s(failures, RESTART_S, RESTART_MAX_S)
        print(f"megatoken node: Ray's control store ended; started again in {pause_s:.1f} s", flush=True)
        time.sleep(pause_s)
        store = RunningProgram(os.posix_spawn(store.argv[0], store.argv, store.env), store.argv, store.env)


def _below(name: str) -> RunningProgram:
    for pid in descendants(os.getpid()):
        with contextlib.suppress(OSError):
            directory = Path("/proc", str(pid))
            if (directory / "comm").read_text().strip() == name:
                argv = tuple(os.fsdecode(word) for word in (directory / "cmdline").read_bytes().split(b"\0")[:-1])
                pairs = (os.fsdecode(pair).partition("=") for pair in (directory / "environ").read_bytes().split(b"\0"))
                return RunningProgram(pid, argv, {key: value for key, equals, value in pairs if equals})
    raise NotRunning(f"Ray runs no {name} below its supervisor")


def _first_to_end(*pids: int) -> int:
    watched: dict[int, int] = {}
    try:
        for pid in pids:
            try:
                watched[os.pidfd_open(pid)] = pid
            except ProcessLookupError:
                return pid
        while True:
            ended, _, _ = select.select(watched, [], [], REAP_S)
            reap_orphans(0)
            if ended:
                return watched[ended[0]]
    finally:
        for descriptor in watched:
            os.close(descriptor)
