"""A marked process is found by its replica, with its state, whatever it forks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from megatoken.process.tag import TaggedProcess, replica_tag, tagged_processes

PROGRAM = """
import os, sys, time
from megatoken.process.tag import tag_process
tag_process(sys.argv[1], "worker")
child = os.fork()
if child:
    print(child, flush=True)
time.sleep(60)
"""


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_worker_and_what_it_forked_are_found_with_their_states() -> None:
    replica = f"chat-{uuid.uuid4().hex[:8]}"
    assert tagged_processes(replica) == []
    worker = subprocess.Popen([sys.executable, "-c", PROGRAM, replica], stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    engine = int(worker.stdout.readline())
    try:
        both = [TaggedProcess("engine", engine, ""), TaggedProcess("worker", worker.pid, "")]
        until(lambda: tagged_processes(replica) == both)  # what was forked has its parent's mark for a moment
        assert tagged_processes(replica[:-1]) == [], "another replica whose name begins like it"
        os.kill(engine, signal.SIGSTOP)
        until(lambda: tagged_processes(replica)[0].state == "stopped")
    finally:
        os.kill(engine, signal.SIGKILL)
        worker.kill()
        worker.wait()
        worker.stdout.close()
    until(lambda: tagged_processes(replica) == [])


def test_replicas_of_one_name_in_two_clusters_are_told_apart() -> None:
    tags = {replica_tag(Path(directory), "m-1") for directory in ("/run/a", "/run/b", "/home/x/run/a")}
    assert len(tags) == 3
    assert all(tag.endswith("-m-1") for tag in tags)
    assert replica_tag(Path("/run/a"), "m-1") in tags
