"""First process of a host: makes the host's own view of the machine, then reaps what its processes leave.

Run by hosts.py as PID 1 of new PID, mount, UTS and IPC namespaces inside the host's network namespace. When it is
killed, the kernel kills every process of the host: a power cut. It decides nothing else.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def prepare(directory: Path, hostname: str) -> None:
    """Gives the host its name, name service, /tmp and /dev/shm, none of them shared with another host."""
    socket.sethostname(hostname)
    mount("--make-rprivate", "/")
    mount("-t", "proc", "proc", "/proc")
    mount("-t", "tmpfs", "-o", "size=2g,mode=1777", "tmpfs", "/dev/shm")
    for name in ("hosts", "resolv.conf"):
        mount("--bind", str(directory / name), f"/etc/{name}")
    for path in {REPOSITORY, Path(sys.prefix).resolve()}:  # a clone under /tmp stays to be seen, and nothing else there
        if path.is_relative_to("/tmp"):
            seen = directory / "tmp" / path.relative_to("/tmp")
            seen.mkdir(parents=True, exist_ok=True)
            mount("--bind", str(path), str(seen))
    mount("--rbind", str(directory / "tmp"), "/tmp")


def reap_forever() -> None:
    """Waits for adopted children, so that a dead process never stays as a zombie that looks alive."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    while True:
        try:
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass
        except ChildProcessError:
            pass
        signal.sigwait({signal.SIGCHLD})


def main() -> None:
    directory, hostname, ready_fd = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    prepare(directory, hostname)
    os.chdir("/")
    os.write(ready_fd, b"ready\n")
    os.close(ready_fd)
    reap_forever()


if __name__ == "__main__":
    main()
