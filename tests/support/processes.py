"""Starts the project's own programs for tests and benchmarks, and checks that nothing of them is left.

    with Processes() as processes:
        worker = processes.start("worker", {...})          # python -m megatoken.worker --config FILE --ready-fd N
        router = processes.start("router", {... worker.ready["address"] ...})

Every process carries a marker in its environment, which its children inherit. So what it leaves behind is found even
when it was adopted by init. Leaving the block stops all of them, newest first, and raises LeftBehind when one remains.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.support.paths import REPOSITORY

MARKER = "MEGATOKEN_TEST_PROCESS"


class DidNotStart(RuntimeError):
    """The process ended, or did not say that it is ready in time. Shows the end of what it wrote."""


class LeftBehind(RuntimeError):
    """A stopped process left children of its own running."""


class Started:
    """One running program: its ready facts, its output, and its end."""

    def __init__(
        self, name: str, process: subprocess.Popen[bytes], ready: dict[str, Any], log: Path, mark: str
    ) -> None:
        self.name = name
        self.process = process
        self.ready = ready
        self.log = log
        self.mark = mark

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def address(self) -> str:
        """host:port from the ready line."""
        return str(self.ready["address"])

    def output(self) -> str:
        """What it wrote to stdout and stderr so far."""
        return self.log.read_text(errors="replace")

    def cpu_s(self) -> float:
        """CPU seconds, user and system, that the process itself has used: from the kernel."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def left(self) -> list[int]:
        """Process ids that carry this process's marker: itself, its children, and theirs."""
        return marked(self.mark)

    def kill(self) -> None:
        """SIGKILL, as a crash would."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def stop(self, timeout_s: float = 20.0) -> int:
        """SIGTERM, then SIGKILL after `timeout_s`; returns the exit status. Raises LeftBehind."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self.kill()
        status = self.process.wait()
        self.check_nothing_left()
        return status

    def check_nothing_left(self, timeout_s: float = 5.0) -> None:
        """Waits until no process carries the marker; kills what remains and raises LeftBehind."""
        deadline = time.monotonic() + timeout_s
        while left := self.left():
            if time.monotonic() > deadline:
                shown = ", ".join(f"{pid} ({command_line(pid)})" for pid in left)
                for pid in left:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                raise LeftBehind(f"{self.name} left behind: {shown}\n{tail(self.output())}")
            time.sleep(0.05)


class Processes:
    """The programs of one test, stopped newest first at the end."""

    def __init__(self, directory: Path | None = None) -> None:
        self._own = tempfile.TemporaryDirectory(prefix="mt-processes-") if directory is None else None
        self.directory = Path(self._own.name) if self._own is not None else Path(str(directory))
        self.directory.mkdir(parents=True, exist_ok=True)
        self.started: list[Started] = []
        self._numbers = itertools.count()  # next() is atomic: starts may come from several threads

    def start(
        self,
        program: str,
        config: Mapping[str, Any],
        *,
        timeout_s: float = 120.0,
        env: Mapping[str, str] | None = None,
        prefix: tuple[str, ...] = (),
    ) -> Started:
        """Runs `python -m megatoken.PROGRAM` on `config` and waits for its ready line. `prefix`: e.g. ip netns exec."""
        config_file = self._write_config(program, config)
        name = config_file.stem
        log = self.directory / f"{name}.log"
        mark = uuid.uuid4().hex
        environment = marked_environment({**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})}, mark)
        reader, writer = os.pipe()
        command = [
            *prefix,
            sys.executable,
            "-m",
            f"megatoken.{program}",
            "--config",
            str(config_file),
            "--ready-fd",
            str(writer),
        ]
        try:
            with log.open("wb") as output:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    pass_fds=(writer,),
                    cwd=REPOSITORY,
                    env=environment,
                )
        finally:
            os.close(writer)
        started = Started(name, process, {}, log, mark)
        self.started.append(started)
        try:
            started.ready.update(read_ready(reader, started, timeout_s))
        finally:
            os.close(reader)
        return started

    def _write_config(self, program: str, config: Mapping[str, Any]) -> Path:
        """A file that no other start has, from whichever thread."""
        while True:
            config_file = self.directory / f"{program}-{next(self._numbers)}.json"
            try:
                descriptor = os.open(config_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            except FileExistsError:  # the directory is shared with other Processes
                continue
            with open(descriptor, "w") as file:
                json.dump(dict(config), file)
            return config_file

    def stop(self) -> None:
        """Stops all, newest first; raises the first LeftBehind after all were stopped."""
        problem: LeftBehind | None = None
        while self.started:
            try:
                self.started.pop().stop()
            except LeftBehind as error:
                problem = problem or error
        if self._own is not None:
            self._own.cleanup()
        if problem is not None:
            raise problem

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is not None:  # the test's own failure comes first; show what the programs said
            for started in self.started:
                print(f"---- {started.name} (pid {started.pid})\n{tail(started.output())}", file=sys.stderr)
        try:
            self.stop()
        except LeftBehind:
            if error is None:
                raise


def read_ready(reader: int, started: Started, timeout_s: float) -> dict[str, Any]:
    """The ready line of a program, from its descriptor. Raises DidNotStart."""
    deadline = time.monotonic() + timeout_s
    received = b""
    while not received.endswith(b"\n"):
        remaining = deadline - time.monotonic()
        if remaining <= 0 or not select.select([reader], [], [], remaining)[0]:
            started.kill()
            raise DidNotStart(f"{started.name} was not ready within {timeout_s:g} s\n{tail(started.output())}")
        part = os.read(reader, 65536)
        if not part:
            started.process.wait()
            status = started.process.returncode
            raise DidNotStart(
                f"{started.name} ended with status {status} before it was ready\n{tail(started.output())}"
            )
        received += part
    facts: dict[str, Any] = json.loads(received)
    return facts


def marked_environment(base: Mapping[str, str], mark: str) -> dict[str, str]:
    """With the marker where it stays readable.

    An engine core writes its title over its environment (setproctitle), up to the first variable that its worker has
    set anew, which goes before the marker.
    """
    renewed = {"VLLM_NO_USAGE_STATS": "0"}
    return {**{name: value for name, value in base.items() if name not in renewed}, **renewed, MARKER: mark}


def marked(mark: str) -> list[int]:
    """Process ids, orphans apart, whose environment holds the marker."""
    wanted = f"{MARKER}={mark}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
    return found


def command_line(pid: int) -> str:
    """The command of a process, for messages; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def tail(text: str, lines: int = 40) -> str:
    """The last lines of a log."""
    return "\n".join(text.splitlines()[-lines:])
