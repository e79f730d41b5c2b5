"""One child process of an actor: started, watched, and ended with it. Knows nothing of Ray.

The thread that forks the child lives as long as the child does, because the kernel sends PR_SET_PDEATHSIG when the
*thread* that forked ends. That thread also takes the child's ready line and its output, which goes to a bounded file.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from megatoken.access.files import write_private
from megatoken.cluster.decide.exit_cause import ExitCause
from megatoken.cluster.runtime_dirs import make_private
from megatoken.process.start_phase import ASKED, FIELD, FIRST

LOG_BYTES = 8 << 20  # a log file is renamed to .1 at this size, so a process keeps at most twice as much
TAIL_LINES = 200
REASON_CHARS = 400
REASON_LINES = 40  # at the end of the output, among which the telling one is looked for
SENT_BY_OTHERS = frozenset({signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP})  # no fault raises these
READY_BYTES = 1 << 20
NOT_INHERITED = ("OMP_NUM_THREADS",)  # Ray sets 1 for an actor that asks for no CPU


@dataclass(frozen=True, slots=True)
class Launch:
    """What to start: `python -m program --config FILE --ready-fd N`."""

    name: str
    program: str
    config: Mapping[str, Any]
    directory: str
    """Runtime directory of the node; configs/ and logs/ are made in it."""
    env: Mapping[str, str] = field(default_factory=dict)
    credentials: str = field(default="", repr=False)
    """Content of its credentials_file, mode 600; empty: it has none."""


@dataclass(frozen=True, slots=True)
class ChildState:
    """What is known of the child. `version` grows with each change."""

    version: int = 0
    phase: str = "starting"
    facts: Mapping[str, Any] | None = None
    """Its ready line, and `start_s`: (phase of its start, seconds) of each."""
    start_phase: str = ""
    """What it does until it serves."""
    reason: str = ""
    cause: ExitCause = ExitCause.UNKNOWN
    pid: int = 0


class Child:
    """Starts at once. Methods may be called from any thread."""

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        self._changed = threading.Condition()
        self._state = ChildState()
        self._lines: deque[str] = deque(maxlen=TAIL_LINES)
        self._phases: list[tuple[str, float]] = []  # with when each began, on the monotonic clock
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = False
        self._thread = threading.Thread(target=self._live, name=f"child-{launch.name}", daemon=True)
        self._thread.start()

    def state(self) -> ChildState:
        return self._state

    def wait_change(self, seen: int, timeout_s: float) -> ChildState:
        """The state as soon as its version is not `seen`, or as it is after `timeout_s`."""
        with self._changed:
            self._changed.wait_for(lambda: self._state.version != seen, timeout_s)
            return self._state

    def tail(self, lines: int) -> str:
        """The last lines it wrote, at most TAIL_LINES from memory or as many as its log file holds."""
        if lines <= len(self._lines):
            return "\n".join(list(self._lines)[-lines:])
        try:
            return "\n".join(self._log_path.read_text(errors="replace").splitlines()[-lines:])
        except OSError:
            return "\n".join(self._lines)

    def stop(self, grace_s: float) -> ChildState:
        """SIGTERM, then SIGKILL after `grace_s`; returns when it has ended."""
        self._stopping = True
        process = self._process
        if process is not None and process.poll() is None:
            process.terminate()
            if not self._ended_within(grace_s):
                process.kill()
        self._ended_within(10.0)
        return self._state

    def give_credentials(self, text: str) -> None:
        """Replaces the child's credentials; it reads them again by itself."""
        write_private(self._credentials_path, text)

    def _ended_within(self, timeout_s: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._state.phase == "exited", timeout_s)

    @property
    def _credentials_path(self) -> Path:
        return Path(self._launch.directory) / "configs" / f"{self._launch.name}.credentials"

    @property
    def _log_path(self) -> Path:
        return Path(self._launch.directory) / "logs" / f"{self._launch.name}.log"

    def _live(self) -> None:
        try:
            process, ready = self._spawn()
        except OSError as error:
            self._become(phase="exited", reason=f"could not start: {error}", cause=ExitCause.START_FAILED)
            return
        self._process = process
        self._become(pid=process.pid)
        if self._stopping:  # stop() came before there was a process
            process.terminate()
        if process.stdout is None:
            raise RuntimeError("the child's output is not a pipe")
        with open(self._log_path, "ab") as log:
            self._follow(process, ready, process.stdout, log)
        status = process.wait()
        self._become(phase="exited", reason=self._why(status), cause=self._cause(status))

    def _spawn(self) -> tuple[subprocess.Popen[bytes], int]:
        directory = Path(self._launch.directory)
        for part in ("configs", "logs", "counters"):
            make_private(directory / part)
        values = dict(self._launch.config)
        if self._launch.credentials:
            self.give_credentials(self._launch.credentials)
            values["credentials_file"] = str(self._credentials_path)
        config = directory / "configs" / f"{self._launch.name}.json"
        write_private(config, json.dumps(values, indent=1))
        env = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
        env |= {"PYTHONUNBUFFERED": "1", **ASKED, **self._launch.env}
        self._begin_phase(FIRST)
        ready_read, ready_write = os.pipe()
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", self._launch.program, "--config", str(config), "--ready-fd", str(ready_write)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(ready_write,),
                env=env,
                bufsize=0,
            )
        except OSError:
            os.close(ready_read)
            raise
        finally:
            os.close(ready_write)
        return process, ready_read

    def _follow(self, process: subprocess.Popen[bytes], ready: int, output: IO[bytes], log: IO[bytes]) -> None:
        """Reads the lines of its start, up to the ready line, and the output until the process has ended."""
        ended = os.pidfd_open(process.pid)
        said, partial = b"", b""
        watched = {ready, output.fileno(), ended}
        try:
            while True:
                readable, _, _ = select.select(watched, [], [])
                if ready in readable:
                    chunk = os.read(ready, 65_536)
                    *lines, said = (said + chunk).split(b"\n")
                    if any(self._take_ready(line) for line in lines) or not chunk or len(said) > READY_BYTES:
                        watched.discard(ready)
                if output.fileno() in readable:
                    chunk = os.read(output.fileno(), 65_536)
                    if not chunk:
                        watched.discard(output.fileno())
                    partial = self._take_output(partial + chunk, log)
                    continue  # drain what it wrote before looking at its end
                if ended in readable:
                    self._take_output(partial + b"\n" if partial else b"", log)
                    return
        finally:
            os.close(ended)
            os.close(ready)
            output.close()

    def _take_ready(self, line: bytes) -> bool:
        """Takes one line of the start; says whether it was the ready line."""
        try:
            facts = json.loads(line)
        except ValueError:
            return False  # it broke before it was ready; its exit tells
        if facts.keys() == {FIELD}:
            self._begin_phase(str(facts[FIELD]))
            return False
        ends_s = [began_s for _, began_s in self._phases[1:]] + [time.monotonic()]
        start_s = [(name, end_s - began_s) for (name, began_s), end_s in zip(self._phases, ends_s, strict=True)]
        self._become(phase="serving", facts={**facts, "start_s": start_s}, start_phase="")
        return True

    def _begin_phase(self, name: str) -> None:
        self._phases.append((name, time.monotonic()))
        self._become(start_phase=name)

    def _take_output(self, content: bytes, log: IO[bytes]) -> bytes:
        *whole, partial = content.split(b"\n")
        for line in whole:
            self._lines.append(line.decode(errors="replace"))
            log.write(line + b"\n")
        if whole:
            log.flush()
            if log.tell() > LOG_BYTES:
                os.replace(self._log_path, self._log_path.with_suffix(".log.1"))
                fresh = os.open(self._log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
                os.dup2(fresh, log.fileno())
                os.close(fresh)
                log.seek(0, os.SEEK_END)
        return partial if len(partial) < READY_BYTES else b""

    def _cause(self, status: int) -> ExitCause:
        if self._stopping:
            return ExitCause.STOPPED
        sent = status < 0 and -status in SENT_BY_OTHERS
        return ExitCause.KILLED_FROM_OUTSIDE if sent else ExitCause.PROGRAM_ENDED

    def _why(self, status: int) -> str:
        if self._stopping:
            return "stopped"
        how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        last = [line.strip() for line in self._lines if line.strip()][-REASON_LINES:]
        telling = next((line for line in reversed(last) if "rror" in line), last[-1] if last else "")
        return f"{how}: {said(telling)[:REASON_CHARS]}" if telling and status >= 0 else how

    def _become(self, **changes: Any) -> None:
        with self._changed:
            before = self._state
            self._state = replace(before, version=before.version + 1, **changes)
            self._changed.notify_all()


def said(line: str) -> str:
    """What a line of output says to people: the message of one that is a JSON log record, else the line itself."""
    text = line.strip()
    if text.startswith("{"):
        try:
            record = json.loads(text)
        except ValueError:
            return text
        message = record.get("message") or record.get("event")
        if isinstance(message, str) and message:
            raised = str(record.get("error") or "").strip().splitlines()
            return f"{message}: {raised[-1]}" if raised else message
    return text
