"""Starts whole clusters for tests through the command line, as a user would, and checks that nothing of them is left.

Every process of a cluster carries a marker in its environment (see processes.py), so what it leaves behind is found
whoever adopted it. Each cluster has its own state and runtime directories.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.support.processes import REPOSITORY, LeftBehind, command_line, marked, marked_environment

UP_TIMEOUT_S = 600.0  # a bound, not an expectation: engines import for minutes on a loaded machine


class CommandFailed(AssertionError):
    """A `megatoken` command ended with another status than it should."""


class RunningCluster:
    """One cluster, its commands, and its processes."""

    def __init__(self, directory: Path, spec: Mapping[str, Any]) -> None:
        self.directory = directory
        self.spec = dict(spec)
        self.mark = uuid.uuid4().hex
        self.spec_file = directory / "spec.yaml"
        self.spec_file.write_text(yaml.safe_dump(self.spec))
        base = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        directories = {
            "MEGATOKEN_STATE_DIR": str(directory / "state"),
            "MEGATOKEN_RUNTIME_DIR": str(directory / "run"),
        }
        self.env = marked_environment({**base, **directories}, self.mark)

    # -- commands --

    def run(self, *words: str, status: int | None = 0, timeout_s: float = UP_TIMEOUT_S) -> str:
        """Runs `megatoken WORDS` and returns its standard output; with `status` 0, any other status raises."""
        done = subprocess.run(
            [sys.executable, "-m", "megatoken.cluster.cli", *words],
            env=self.env,
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if status is not None and done.returncode != status:
            raise CommandFailed(f"megatoken {' '.join(words)}: status {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done.stdout if status == 0 else done.stdout + done.stderr

    def up(self, *words: str) -> str:
        return self.run("up", "-f", str(self.spec_file), "--detach", *words)

    def apply(self, change: Callable[[dict[str, Any]], None]) -> str:
        """Changes the spec and applies it."""
        change(self.spec)
        self.spec_file.write_text(yaml.safe_dump(self.spec))
        return self.run("apply", "-f", str(self.spec_file))

    def foreground(self) -> subprocess.Popen[str]:
        """`megatoken up` that stays; its output is a pipe."""
        return subprocess.Popen(
            [sys.executable, "-m", "megatoken.cluster.cli", "up", "-f", str(self.spec_file)],
            env=self.env,
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def down(self, drain_s: float = 5.0) -> None:
        self.run("down", "--drain", str(drain_s))

    def status(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.run("status", "--json"))
        return document

    def address(self, kind: str) -> str:
        """host:port of the first serving process of a kind."""
        return next(str(entry["address"]) for entry in self.status()["processes"] if entry["kind"] == kind)

    def ready(self, model: str) -> list[str]:
        """Ids of the READY replicas of a model."""
        return [
            row["replica"] for row in self.status()["replicas"] if row["model"] == model and row["state"] == "READY"
        ]

    def wait(self, met: Callable[[dict[str, Any]], bool], timeout_s: float = 60.0) -> dict[str, Any]:
        """The first status that meets a condition. Raises TimeoutError showing the last one."""
        deadline = time.monotonic() + timeout_s
        while True:
            status = self.status()
            if met(status):
                return status
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"not met within {timeout_s:g} s\n{self.run('status')}\n{self.run('events')[-3000:]}"
                )
            time.sleep(0.1)

    # -- processes --

    def pids(self, *words: str) -> list[int]:
        """Ids of this cluster's processes whose command line holds every word."""
        return [pid for pid in marked(self.mark) if all(word in command_line(pid) for word in words)]

    def pid(self, *words: str, timeout_s: float = 10.0) -> int:
        """The one process whose command line holds every word. A fork has its parent's until its own program runs."""
        deadline = time.monotonic() + timeout_s
        while len(found := self.pids(*words)) != 1:
            if time.monotonic() > deadline:
                raise AssertionError(f"{words}: {[(pid, command_line(pid)) for pid in found]}")
            time.sleep(0.02)
        return found[0]

    def parent(self, pid: int) -> int:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])

    def kill_all(self) -> None:
        """Kills every process that carries the marker."""
        for pid in marked(self.mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def wait_nothing_left(self, timeout_s: float = 15.0) -> None:
        """Waits until no process carries the marker; kills what remains and raises LeftBehind."""
        deadline = time.monotonic() + timeout_s
        while left := marked(self.mark):
            if time.monotonic() > deadline:
                shown = "\n".join(f"{pid} ({command_line(pid)})" for pid in left)
                for pid in left:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                raise LeftBehind(f"left behind:\n{shown}")
            time.sleep(0.1)


@contextlib.contextmanager
def running(directory: Path, spec: Mapping[str, Any]) -> Iterator[RunningCluster]:
    """A cluster that is up; takes it down at the end and checks that nothing is left."""
    cluster = RunningCluster(directory, spec)
    try:
        cluster.up()
        yield cluster
        cluster.down()
        cluster.wait_nothing_left()
    finally:
        cluster.kill_all()
