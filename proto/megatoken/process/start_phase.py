"""What a process that starts does now, told by itself or by any process that it started on its node.

The way is the pipe of the ready line: a JSON line {"start_phase": NAME} for each phase, before the ready line, where
whoever started the process asks for it (ASKED). It measures how long each takes, by one clock.
"""

from __future__ import annotations

import json
import os
import stat
from typing import Final

VARIABLE: Final = "MEGATOKEN_START_PHASE"  # PID namespace, pid and descriptor of the ready pipe
ASKED: Final = {VARIABLE: "asked"}  # in the environment of the process
FIELD: Final = "start_phase"
FIRST: Final = "start"  # from the fork to the program's first line


def share_phases(ready_fd: int | None) -> None:
    """Lets this process and those that it starts tell their phases, if that was asked for."""
    if ready_fd is not None and os.environ.get(VARIABLE) == ASKED[VARIABLE]:
        os.environ[VARIABLE] = f"{_namespace()}:{os.getpid()}:{ready_fd}"


def begin_phase(name: str) -> None:
    """A phase begins, and the one before ends. Does nothing where nobody listens, or listens no more."""
    namespace, _, place = os.environ.get(VARIABLE, "").partition(":")
    if namespace != _namespace():  # a rank on another node, where the pid is somebody else's
        return
    pid, _, descriptor = place.partition(":")
    try:
        pipe = os.open(f"/proc/{pid}/fd/{descriptor}", os.O_WRONLY | os.O_CLOEXEC)
    except OSError:  # the process serves already, and has closed it
        return
    try:
        if stat.S_ISFIFO(os.fstat(pipe).st_mode):
            os.write(pipe, json.dumps({FIELD: name}).encode() + b"\n")
    except OSError:
        return
    finally:
        os.close(pipe)


def _namespace() -> str:
    found = os.stat("/proc/self/ns/pid")
    return f"{os.uname().nodename}/{found.st_dev}/{found.st_ino}"
