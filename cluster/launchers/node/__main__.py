"""Supervises Ray on one machine. Every launcher runs it; nothing imports it.

    python -m megatoken.cluster.launchers.node ...
    run   --address A [--directory D] [--then 'COMMAND'] -- ray start ... --block
    start ... (the same, in the background; returns when Ray runs)
    stop  --directory D

`run` stays in the foreground: for containers and systemd. A node's Ray that ran and ended (it ends itself when it is
cut off for long) is started again, so that a node comes back with its link; the head's is not, but its control store is
where what it knows lies in Redis (RAY_REDIS_ADDRESS; store.py). The supervisor adopts
whatever its Ray leaves behind (Linux child subreaper) and ends it, so that after `stop` no process of that Ray is left,
and no other Ray on the machine is touched, as `ray stop` would. `--then` runs once Ray is up: the head brings the
cluster's controller up with it.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import resource
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from megatoken.backoff import doubling_pause_s
from megatoken.cluster.launchers.node import store
from megatoken.cluster.launchers.node.environment import (
    AddressError,
    host_digest,
    interface_addresses,
    node_environment,
    resolve_address,
    with_label,
)
from megatoken.process.host import HOST_LABEL
from megatoken.process.tree import adopt_orphans, descendants, end_all_below, reap_orphans, send

STARTED = "Ray runtime started."  # what `ray start` prints when its processes run
PID_FILE, LOG_FILE = "node.pid", "node.log"
STOP_S = 20.0  # for `ray start --block` to end its processes in order, before they are killed
POLL_S = 0.2
READ_BYTES = 65_536
HEAD = "--head"  # with its store in memory a new one is a new cluster, and old nodes would wait for it for ever
REAP_S = 0.5  # between looks for adopted processes that have ended
RESTART_S, RESTART_MAX_S = 1.0, 30.0  # pauses before Ray is started again
SETTLED_S = 60.0  # a Ray that ran this long starts the pauses anew
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def main() -> int:
    arguments = _arguments()
    directory = Path(arguments.directory).expanduser()
    if arguments.action == "stop":
        return stop(directory)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if arguments.action == "start":
        return start(directory, arguments.timeout_s)
    try:
        address = resolve_address(arguments.address, arguments.head)
        added = node_environment(address, arguments.interface, interface_addresses(), os.environ)
    except AddressError as error:
        print(f"megatoken node: {error}", file=sys.stderr)
        return 2
    command = [part.replace("{address}", address) for part in arguments.command]
    command = with_label(command, HOST_LABEL, host_digest(address, directory))
    _allow_open_files()
    env = {**os.environ, **added}
    return run(directory, command, store.namespaced(env) if store.outlives(env) else env, arguments.then)


def _allow_open_files() -> None:
    """As many as the machine lets this user open: a login shell's 1,024 is too few for Ray and for a router."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def start(directory: Path, timeout_s: float) -> int:
    """Runs this program again with `run`, in a session of its own; returns when Ray runs, or with why it does not."""
    if _holder(directory):
        print(f"megatoken node: Ray of {directory} runs already; stop it first", file=sys.stderr)
        return 3
    log = directory / LOG_FILE
    again = [sys.executable, "-m", "megatoken.cluster.launchers.node", "run", *sys.argv[2:]]
    with log.open("wb") as output:
        process = subprocess.Popen(
            again, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True, cwd="/"
        )
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if (directory / "ready").exists():
            return 0
        if process.poll() is not None:
            print(f"megatoken node: Ray did not start: {_why(log)}", file=sys.stderr)
            return process.returncode or 1
        time.sleep(POLL_S)
    stop(directory)
    print(f"megatoken node: Ray did not start within {timeout_s:.0f} s: {_why(log)}", file=sys.stderr)
    return 1


def run(directory: Path, command: list[str], env: dict[str, str], then: str | None) -> int:
    """Ray in the foreground until SIGTERM comes, a node's started again when it ends; then nothing of it is left.

    A first start that fails is the caller's to know of: it ends this with Ray's own status.
    """
    lock = (directory / PID_FILE).open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"megatoken node: Ray of {directory} runs already; stop it first", file=sys.stderr)
        return 3
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    (directory / "ready").unlink(missing_ok=True)
    adopt_orphans()
    for number in SIGNALS:
        signal.signal(number, _interrupt)
    failures, ran = 0, False
    try:
        while True:
            began_s = time.monotonic()
            status, up = _run_once(directory, command, env, then)
            ran = ran or up
            if not ran or HEAD in command:
                return status
            failures = 1 if time.monotonic() - began_s >= SETTLED_S else failures + 1
            pause_s = doubling_pause_s(failures, RESTART_S, RESTART_MAX_S)
            print(f"megatoken node: Ray ended with status {status}; started again in {pause_s:.0f} s", flush=True)
            time.sleep(pause_s)
    except KeyboardInterrupt:
        return 0
    except OSError as error:
        print(f"megatoken node: {command[0]} cannot be run: {error.strerror}", file=sys.stderr)
        return 127
    finally:
        (directory / PID_FILE).unlink(missing_ok=True)


def _run_once(directory: Path, command: list[str], env: dict[str, str], then: str | None) -> tuple[int, bool]:
    """One life of Ray, after which nothing of it is left: its status, and whether it came up. A signal interrupts."""
    ray = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        return _follow(ray, directory, env, then)
    finally:
        previous = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS}
        _end(ray)
        (directory / "ready").unlink(missing_ok=True)
        for number, handler in previous.items():
            signal.signal(number, handler)


def _follow(ray: subprocess.Popen[bytes], directory: Path, env: dict[str, str], then: str | None) -> tuple[int, bool]:
    """Passes Ray's output on; once it runs, runs `then` and tells whoever waits."""
    up = False
    for line in _output(ray):
        print(line, flush=True)
        if not up and STARTED in line:
            if then and subprocess.run(shlex.split(then), env=env, check=False).returncode:
                print(f"megatoken node: failed once Ray ran: {then}", file=sys.stderr)
                return 1, False
            up = True
            (directory / "ready").touch()
    status = ray.wait()
    if up and not status and store.outlives(env):  # it left its processes to us
        try:
            return store.watch(), True
        except store.NotRunning as error:
            print(f"megatoken node: {error}", file=sys.stderr)
            return 1, True
    return status, up


def _output(ray: subprocess.Popen[bytes]) -> Iterator[str]:
    """Its lines until it has ended. What it leaves behind may hold the pipe open for longer."""
    if ray.stdout is None:
        raise RuntimeError("Ray's output is not a pipe")
    output, ended, partial = ray.stdout.fileno(), os.pidfd_open(ray.pid), b""
    watched = {output, ended}
    try:
        while True:
            readable, _, _ = select.select(watched, [], [], REAP_S)
            reap_orphans(ray.pid)
            if output in readable:
                chunk = os.read(output, READ_BYTES)
                if not chunk:
                    watched.discard(output)
                *lines, partial = (partial + chunk).split(b"\n")
                yield from (line.decode(errors="replace") for line in lines)
            elif ended in readable:
                return
    finally:
        os.close(ended)
        ray.stdout.close()


def _end(ray: subprocess.Popen[bytes] | None) -> None:
    """Asks Ray to end, then kills every process that is still below this one."""
    if ray is not None and ray.poll() is None:
        ray.terminate()
        try:
            ray.wait(STOP_S)
        except subprocess.TimeoutExpired:
            pass
    end_all_below(STOP_S)


def stop(directory: Path) -> int:
    """Ends the supervisor of this directory, and waits until it is gone; nothing to stop is fine."""
    pid = _holder(directory)
    if not pid:
        return 0
    send(pid, signal.SIGTERM)
    deadline = time.monotonic() + 2 * STOP_S + 5
    while time.monotonic() < deadline:
        if not _runs(pid):  # it lets go of the lock a moment before
            return 0
        time.sleep(POLL_S)
    left = descendants(pid)
    for each in (pid, *left):
        send(each, signal.SIGKILL)
    print(f"megatoken node: {pid} did not stop in time and was killed", file=sys.stderr)
    return 1


def _holder(directory: Path) -> int:
    """The pid of the running supervisor; 0 when none holds the lock. A stale file of a crash holds none."""
    path = directory / PID_FILE
    try:
        with path.open("r+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(file.read() or 0)
    except (OSError, ValueError):
        return 0
    return 0


def _runs(pid: int) -> bool:
    """Whether it is there and has not ended; whoever started it may not have collected it yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _why(log: Path) -> str:
    """The last lines of the log that say something, as one line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    said = [line for line in lines if any(word in line.lower() for word in ("error", "fail", "megatoken node", "not"))]
    return " | ".join(_last(said or lines, 3)) or "it said nothing"


def _last(lines: Iterable[str], count: int) -> list[str]:
    return [line[:300] for line in list(lines)[-count:]]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="megatoken.cluster.launchers.node")
    parser.add_argument("action", choices=("run", "start", "stop"))
    parser.add_argument("--directory", default="~/.megatoken/node", help="pid file, log and token")
    parser.add_argument("--address", default="auto", help="of this node; auto: the one that reaches the head")
    parser.add_argument("--head", help="HOST:PORT of the head, for --address auto")
    parser.add_argument("--interface", help="for Gloo, NCCL and RCCL; by default the one with the address")
    parser.add_argument("--then", help="command to run once Ray runs")
    parser.add_argument("--timeout-s", type=float, default=120.0, help="of `start`")
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    arguments = parser.parse_args(words[:cut])
    arguments.command = words[cut + 1 :]  # the ray start command; {address} in it is replaced
    if arguments.action != "stop" and not arguments.command:
        parser.error("the ray start command is missing; put it behind --")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
