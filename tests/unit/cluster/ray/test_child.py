"""One child process: its ready line, its output, its end, and why it ended."""

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatoken.cluster.decide.exit_cause import ExitCause
from megatoken.cluster.ray.child import Child, ChildState, Launch, said
from megatoken.log import JsonFormatter

PROGRAM = """
import json, os, subprocess, sys, time
from megatoken.process.start_phase import begin_phase, share_phases
arguments = sys.argv[1:]
config = json.load(open(arguments[arguments.index("--config") + 1]))
ready = int(arguments[arguments.index("--ready-fd") + 1])
print("hello from the child", config["word"], os.environ.get("WORD"), os.environ.get("OMP_NUM_THREADS"))
if config["word"] == "broken":
    print("ValueError: a broken word")
    sys.exit(3)
share_phases(ready)
begin_phase("import")
weights = "from megatoken.process.start_phase import begin_phase; begin_phase('weights')"
subprocess.run([sys.executable, "-c", weights], check=True)
time.sleep(0.5 if config["word"] == "slow" else 0.0)
with os.fdopen(ready, "w") as pipe:
    pipe.write(json.dumps({"address": "here"}) + "\\n")
time.sleep(60)
"""


@pytest.fixture
def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Launch]:
    (tmp_path / "child_program.py").write_text(PROGRAM)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    env = {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]), "WORD": "given"}
    return lambda word: Launch("one", "child_program", {"word": word}, str(tmp_path / "run"), env)


def until(child: Child, phase: str) -> ChildState:
    deadline = time.monotonic() + 30
    state = child.state()
    while state.phase != phase:
        assert time.monotonic() < deadline, state
        state = child.wait_change(state.version, 1.0)
    return state


def test_it_serves_and_stops(launch: Callable[[str], Launch], tmp_path: Path) -> None:
    child = Child(launch("fine"))
    state = until(child, "serving")
    assert state.facts is not None
    assert state.facts["address"] == "here"
    assert [name for name, _ in state.facts["start_s"]] == ["start", "import", "weights"]
    assert all(0.0 <= seconds < 30.0 for _, seconds in state.facts["start_s"])
    assert state.start_phase == ""
    ended = child.stop(5.0)
    assert (ended.reason, ended.cause) == ("stopped", ExitCause.STOPPED)
    assert "hello from the child fine given None" in child.tail(10)
    config = tmp_path / "run" / "configs" / "one.json"
    assert json.loads(config.read_text()) == {"word": "fine"}
    assert config.stat().st_mode & 0o777 == 0o600
    assert "hello" in (tmp_path / "run" / "logs" / "one.log").read_text()


def test_what_it_does_is_known_while_it_starts(launch: Callable[[str], Launch]) -> None:
    child = Child(launch("slow"))
    state, seen = child.state(), []
    while state.phase == "starting":
        seen.append(state.start_phase)
        state = child.wait_change(state.version, 30.0)
    child.stop(5.0)
    assert list(dict.fromkeys(name for name in seen if name)) == ["start", "import", "weights"]


def test_its_failure_names_the_status_and_the_telling_line(launch: Callable[[str], Launch]) -> None:
    child = Child(launch("broken"))
    state = until(child, "exited")
    assert (state.reason, state.cause) == ("exit status 3: ValueError: a broken word", ExitCause.PROGRAM_ENDED)


def test_its_kill_names_the_signal(launch: Callable[[str], Launch]) -> None:
    child = Child(launch("fine"))
    os.kill(until(child, "serving").pid, signal.SIGKILL)
    state = until(child, "exited")
    assert (state.reason, state.cause) == ("killed by SIGKILL", ExitCause.KILLED_FROM_OUTSIDE)


def test_a_program_that_cannot_start_says_so(launch: Callable[[str], Launch], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    assert "could not start" in until(Child(launch("fine")), "exited").reason


def test_a_log_record_is_told_as_its_sentence() -> None:
    record = logging.LogRecord("worker", logging.ERROR, "f", 1, "the engine died", (), None)
    try:
        raise ValueError("no memory left")
    except ValueError:
        record.exc_info = sys.exc_info()
    line = JsonFormatter({"process": "worker"}).format(record)
    assert line.startswith("{")
    assert said(line) == "the engine died: ValueError: no memory left"
    assert said(' {"half": ') == '{"half":'
    assert said("[1]") == "[1]"
    assert said("plain words") == "plain words"
