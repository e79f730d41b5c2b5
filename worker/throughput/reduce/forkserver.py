"""A clean parent that has imported torch once and forks a reducer for each epoch.

    python -m megatoken.worker.throughput.reduce.forkserver CONTROL_FD STORE_LISTENER_FD

Importing torch takes seconds of CPU, forking a process that has it takes milliseconds, so a new epoch costs no import.
The fork server itself never makes a group, a thread or a device context: what it forks starts clean. It has one thread
and obeys one line at a time:
  F <n>   and a socket beside it (SCM_RIGHTS): fork reducer n on that socket
  K <n>   kill reducer n and wait until it is gone
At its start it writes one JSON line: {"backends": [...], "torch": version}. It ends with the agent, and its reducers
with it.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys

from megatoken.process.tree import die_with_parent


def main() -> None:
    """Runs until the agent closes the control socket."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the agent's to handle
    control = socket.socket(fileno=int(sys.argv[1]))
    listener = int(sys.argv[2])
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"  # threads would not survive the fork
    import torch

    from megatoken.worker.throughput.reduce import process_group  # imported here, for the children

    torch.set_num_threads(1)
    children: dict[int, int] = {}
    facts = {"backends": _in_child(process_group.usable_backends), "torch": torch.__version__}
    control.sendall(json.dumps(facts).encode() + b"\n")
    wake_reader, wake_writer = os.pipe()
    os.set_blocking(wake_writer, False)
    signal.set_wakeup_fd(wake_writer)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    while True:
        ready, _, _ = select.select([control.fileno(), wake_reader], [], [])
        if wake_reader in ready:
            os.read(wake_reader, 4096)
            _reap(children)
        if control.fileno() in ready:
            line, descriptors, _, _ = socket.recv_fds(control, 64, 1)
            if not line:
                break
            verb, _, number = line.decode().partition(" ")
            if verb == "F" and descriptors:
                children[int(number)] = _fork(descriptors[0], listener, (control, wake_reader, wake_writer))
                os.close(descriptors[0])
            elif verb == "K":
                _kill(children.pop(int(number), 0))
    for pid in children.values():
        _kill(pid)


def _fork(channel: int, listener: int, unneeded: tuple[socket.socket, int, int]) -> int:
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        die_with_parent(parent)
        unneeded[0].close()
        os.close(unneeded[1])
        os.close(unneeded[2])
        from megatoken.worker.throughput.reduce.reducer import serve

        serve(socket.socket(fileno=channel), listener)
    except ConnectionError:
        pass  # the agent left in the middle of a question
    except BaseException as error:
        print(f"reducer: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(0)  # no destructors: one of them could wait for a peer


def _in_child(question: object) -> list[str]:
    """Asks in a throwaway child: looking for devices starts a runtime that must not be forked."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writer, json.dumps(question()).encode())  # type: ignore[operator]
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(pid, 0)
    return list(json.loads(answer)) if answer else ["gloo"]


def _reap(children: dict[int, int]) -> None:
    for number, pid in list(children.items()):
        if os.waitpid(pid, os.WNOHANG)[0]:
            del children[number]


def _kill(pid: int) -> None:
    if pid:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
