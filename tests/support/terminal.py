"""A real terminal for tests: tmux with one window, keys sent, the screen read back."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

TIMEOUT_S = 40.0


class Terminal:
    """A tmux server of its own. Leaving the block ends it and what runs in it."""

    def __init__(self, command: str, width: int = 80, height: int = 24, env: Mapping[str, str] | None = None) -> None:
        self._socket = f"megatoken-test-{uuid.uuid4().hex[:8]}"
        # A test runner's idea of its own terminal (COLUMNS, LINES) is not this one's.
        given = {name: value for name, value in (env or os.environ).items() if name not in ("COLUMNS", "LINES")}
        self._env = {**given, "LC_ALL": "C.UTF-8", "TERM": "xterm-256color"}
        size = ("-x", str(width), "-y", str(height))
        self.tmux("-f", "/dev/null", "new-session", "-d", *size, command)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        subprocess.run(["tmux", "-L", self._socket, "kill-server"], capture_output=True, timeout=20, check=False)

    def tmux(self, *arguments: str) -> str:
        """One tmux command; returns what it prints."""
        command = ["tmux", "-L", self._socket, *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True, env=self._env).stdout

    def screen(self) -> str:
        """What is to be seen now."""
        return self.tmux("capture-pane", "-p")

    def press(self, *keys: str) -> None:
        """Sends keys, by tmux's names."""
        self.tmux("send-keys", *keys)

    def wait_for(self, *texts: str, gone: str | None = None, timeout_s: float = TIMEOUT_S) -> str:
        """The screen once it shows all of `texts` and not `gone`. Raises AssertionError with the last screen."""
        deadline = time.monotonic() + timeout_s
        while True:
            screen = self.screen()
            if all(text in screen for text in texts) and (gone is None or gone not in screen):
                return screen
            if time.monotonic() > deadline:
                raise AssertionError(f"never showed {texts} without {gone!r}:\n{screen}\n{self._stacks()}")
            time.sleep(0.1)

    def _stacks(self) -> str:
        """Where the program hangs: its stacks, if it is a Python with -X faulthandler, which ends it."""
        shell = self.tmux("display-message", "-p", "#{pane_pid}").strip()
        for child in Path(f"/proc/{shell}/task/{shell}/children").read_text().split():
            os.kill(int(child), signal.SIGABRT)
        time.sleep(1.0)
        return self.tmux("capture-pane", "-p", "-S", "-200")
