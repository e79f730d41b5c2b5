"""The plugin that vLLM loads everywhere acts only below a worker of ours. Each case runs in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatoken.worker.engines.vllm.plugins import OWNER_VARIABLE

# PR_GET_PDEATHSIG (2) tells which signal the parent's death sends.
SHOW = """
import ctypes, os, sys
sys.modules["megatoken.worker.engines.vllm.resume"] = type(sys)("stub")
sys.modules["megatoken.worker.engines.vllm.resume"].install = lambda: print("installed")
{before}
from megatoken.worker.engines.vllm.plugins import tie_to_parent
tie_to_parent()
signal = ctypes.c_int()
ctypes.CDLL(None).prctl(2, ctypes.byref(signal), 0, 0, 0)
print(signal.value)
"""


def run(before: str = "", **variables: str) -> list[str]:
    environment = {name: value for name, value in os.environ.items() if name not in (OWNER_VARIABLE, "RAY_RAYLET_PID")}
    code = SHOW.format(before=before)
    done = subprocess.run(
        [sys.executable, "-c", code], env={**environment, **variables}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("before", "raylet"),
    [("", False), (f"os.environ[{OWNER_VARIABLE!r}] = str(os.getpid())", False), ("", True)],
    ids=["no worker above", "the worker itself", "a child of Ray's own"],
)
def test_it_leaves_everyone_else_alone(before: str, raylet: bool) -> None:
    variables = {OWNER_VARIABLE: "1", "RAY_RAYLET_PID": str(os.getpid())} if raylet else {}
    assert run(before, **variables) == ["0"]


def test_it_ties_a_child_of_a_worker_and_readies_it_for_resumes() -> None:
    assert run(**{OWNER_VARIABLE: "1"}) == ["installed", str(int(signal.SIGKILL))]


def test_a_fork_dies_with_its_parent(tmp_path: Path) -> None:
    code = """
import os, sys, time
from megatoken.worker.engines.vllm.plugins import tie_forks
tie_forks()
child = os.fork()
if child == 0:
    open(sys.argv[1], "w").write("up")
    time.sleep(60)
print(child, flush=True)
time.sleep(60)
"""
    mark = tmp_path / "up"
    with subprocess.Popen([sys.executable, "-c", code, str(mark)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        wait_until(lambda: mark.exists())
        parent.kill()
    wait_until(lambda: not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2])


def wait_until(holds, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline:
            raise AssertionError("it did not happen in time")
        time.sleep(0.01)
