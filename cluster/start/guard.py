"""Keeps one promise: when the owner of a local cluster ends, however it ends, nothing that it started remains.

    python -m megatoken.cluster.start.guard --clean DIR ... [--lifeline-fd N] -- COMMAND ...

Runs COMMAND (the owner) as its child and adopts every orphan below it (PR_SET_CHILD_SUBREAPER), because Ray's own
agents outlive a killed raylet by minutes. It ends the owner when the lifeline is closed, which the kernel does when
`megatoken up` dies, and then kills whatever is left below it and removes the directories. Only the standard library:
it must start fast and not fail. The owner dies in its turn when the guard is killed (see owner.py).
"""

from __future__ import annotations

import argparse
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from megatoken.process.tree import adopt_orphans, end_all_below, reap, send

OWNER_GRACE_S = 20.0  # between SIGTERM and SIGKILL
SWEEP_S = 10.0  # limit on killing what is left


def main() -> int:
    """Runs until the owner has ended and nothing is left below; returns the owner's exit status."""
    parser = argparse.ArgumentParser(prog="megatoken.cluster.start.guard")
    parser.add_argument(
        "--clean", action="append", default=[], type=Path, help="file or directory to remove at the end"
    )
    parser.add_argument("--lifeline-fd", type=int, default=None, help="its end of file ends the owner")
    parser.add_argument("--ready-fd", type=int, default=None, help="passed on to the owner")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    command = [part for part in arguments.command if part != "--"]
    adopt_orphans()
    wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda received, _frame: asked.append(received))
    signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
    inherited = () if arguments.ready_fd is None else (arguments.ready_fd,)
    owner = subprocess.Popen(command, pass_fds=inherited)
    if arguments.ready_fd is not None:
        os.close(arguments.ready_fd)
    status = watch(owner.pid, arguments.lifeline_fd, wake_read, asked)
    end_all_below(SWEEP_S)
    for path in arguments.clean:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return status


def watch(owner: int, lifeline: int | None, wake: int, asked: list[int]) -> int:
    """Reaps until the owner has ended; ends it when asked to or when the lifeline closes."""
    watched = {wake} | ({lifeline} if lifeline is not None else set())
    kill_at_s: float | None = None
    while True:
        try:
            status = reap(owner)
        except ChildProcessError:
            return 0
        if status is not None:
            return status
        left_s = None if kill_at_s is None else max(0.0, kill_at_s - time.monotonic())
        readable, _, _ = select.select(watched, [], [], left_s)
        if wake in readable:
            os.read(wake, 4096)
        cut = lifeline is not None and lifeline in readable and not os.read(lifeline, 4096)
        if cut and lifeline is not None:
            watched.discard(lifeline)
        if (cut or asked) and kill_at_s is None:
            kill_at_s = time.monotonic() + OWNER_GRACE_S
            send(owner, signal.SIGTERM)
        elif kill_at_s is not None and time.monotonic() >= kill_at_s:
            send(owner, signal.SIGKILL)
            kill_at_s = time.monotonic() + OWNER_GRACE_S


if __name__ == "__main__":
    sys.exit(main())
