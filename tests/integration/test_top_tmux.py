"""`megatoken top` in a real terminal: tmux at 80x24, keys sent, the screen read back.

Against a fake controller, so that what the screen must say is known; test_monitoring_live.py uses a real cluster.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.terminal import Terminal

REPOSITORY = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(
    shutil.which("tmux") is None, reason="tmux is not installed (Debian: apt-get install tmux)"
)


@pytest.fixture
def control() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.fake_control"], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def terminal(control: subprocess.Popen[str]) -> Iterator[Terminal]:
    assert control.stdout is not None
    address = control.stdout.readline().strip()
    top = f"{sys.executable} -X faulthandler -m megatoken.cluster.cli top --control {address}"
    command = f"cd {REPOSITORY} && {top}; echo left: $?; cat"
    with Terminal(command) as started:
        yield started


def test_top_in_80_columns(terminal: Terminal, control: subprocess.Popen[str]) -> None:
    screen = terminal.wait_for("code-0", "TTFT 4.3ms / 9.0ms / 640ms", "STARTING -> READY")
    lines = screen.splitlines()
    assert lines[0].startswith("megatoken top  fake  SIMULATED  generation 4")
    assert "tok/s" in lines[1]
    assert any(bar in lines[1] for bar in "▁▂▃▄▅▆▇█")
    assert "efficiency 93%" in lines[2]
    assert "ceiling 97% (idle)" in lines[4]
    (row,) = [line for line in lines if line.lstrip().startswith("chat-1")]
    assert row.split() == ["chat-1", "READY", "node-b", "200", "4", "1", "50%", "3m"]
    assert all(key in lines[-1] for key in ("sort", "filter", "drain", "scale", "quit"))
    assert len(lines) == 24
    assert max(map(len, lines)) <= 80

    terminal.press("s", "s")
    screen = terminal.wait_for("↓TOK/S")
    rows = [line.split()[0] for line in screen.splitlines() if (line.split()[:1] and "-0" in line) or "-1 " in line]
    assert rows[0] == "chat-1"

    terminal.press("-l", "/code")  # in one piece
    terminal.wait_for("code-0", "filter 'code'", gone="chat-0")
    terminal.press("Escape")
    terminal.wait_for("chat-0")

    terminal.press("Up", "Up")  # the cursor stayed on code-0, the last row
    terminal.press("d")
    terminal.wait_for("Drain chat-1?")
    terminal.press("n")
    terminal.wait_for("chat-0", gone="Drain chat-1?")
    terminal.press("d")
    terminal.wait_for("Drain chat-1?")
    terminal.press("y")
    terminal.wait_for("DRAINING", "drain chat-1")

    terminal.press("+")
    terminal.wait_for("Scale chat from 2 to 3 replicas?")
    terminal.press("y")
    terminal.wait_for("chat-2", "scale chat 3")

    terminal.press("q")
    terminal.wait_for("left: 0")


def test_top_outlives_its_controller_and_says_so(terminal: Terminal, control: subprocess.Popen[str]) -> None:
    terminal.wait_for("chat-0")
    control.kill()
    screen = terminal.wait_for("controller unreachable for", "chat-0")
    assert "what is below is old" in screen
    terminal.press("q")
    terminal.wait_for("left: 0")
