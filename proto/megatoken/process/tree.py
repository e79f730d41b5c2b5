"""What a process has to do with those above and below it: end with its parent, adopt orphans, end what it left. Linux.

Only the standard library, since guards and forks use it in their first milliseconds.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from pathlib import Path
from typing import Final

PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h
PR_SET_CHILD_SUBREAPER: Final = 36
SWEEP_PAUSE_S: Final = 0.02


def die_with_parent(parent: int | None = None, number: signal.Signals = signal.SIGKILL) -> None:
    """Asks the kernel to send this process `number` when the *thread* that started it ends.

    Exits at once when `parent` (by default the present one) is gone already, which closes the race between fork and
    this call. Raises OSError.
    """
    parent = parent or os.getppid()
    _prctl(PR_SET_PDEATHSIG, number, "PR_SET_PDEATHSIG")
    if os.getppid() != parent or parent == 1:
        os._exit(1)


def adopt_orphans() -> None:
    """Makes this process the parent of whatever is left below it when its parent there ends. Raises OSError."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1, "PR_SET_CHILD_SUBREAPER")


def descendants(root: int) -> list[int]:
    """Process ids below `root` that live, from /proc; parents before their children."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                state, parent = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[:2]
            except (OSError, ValueError):
                continue  # it ended meanwhile
            if state != "Z":
                children.setdefault(int(parent), []).append(int(entry))
    found: list[int] = []
    level = [root]
    while level:
        level = [pid for parent in level for pid in children.get(parent, ())]
        found += level
    return found


def send(pid: int, number: signal.Signals) -> None:
    """Sends a signal; one that is gone gets none."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def reap(child: int = 0) -> int | None:
    """Collects every child that has ended. The exit status of `child` if it is among them, else None.

    Raises ChildProcessError when there is no child left that could end.
    """
    found: int | None = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            if found is None:
                raise
            return found
        if pid == 0:
            return found
        if pid == child:
            found = abs(os.waitstatus_to_exitcode(status))


def reap_orphans(child: int) -> None:
    """Collects adopted children that have ended, and never `child`: whoever started it waits for it."""
    flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
    try:
        while (ended := os.waitid(os.P_ALL, 0, flags)) is not None and ended.si_pid != child:
            os.waitpid(ended.si_pid, os.WNOHANG)
    except ChildProcessError:  # none is left
        return


def end_all_below(limit_s: float) -> None:
    """Kills everything below this process until nothing is left, for at most `limit_s`."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        for pid in descendants(os.getpid()):
            send(pid, signal.SIGKILL)
        try:
            reap()
        except ChildProcessError:
            return
        time.sleep(SWEEP_PAUSE_S)


def _prctl(option: int, value: int, name: str) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({name})")
