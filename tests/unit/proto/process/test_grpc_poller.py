"""Programs that move tokens import gRPC with its older poller, and what they start does not inherit the choice."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from megatoken.process.grpc_poller import OLDER, VARIABLE

WATCHED = """
import importlib, os, sys

class Watch:
    def find_spec(self, name, path, target=None):
        if name == "grpc":
            print(os.environ.get(sys.argv[2], "unset"))

sys.meta_path.insert(0, Watch())
importlib.import_module(sys.argv[1])
print(os.environ.get(sys.argv[2], "unset"))
"""


@pytest.mark.parametrize("program", ["megatoken.router", "megatoken.router.edge", "megatoken.worker"])
@pytest.mark.parametrize(("given", "seen"), [(None, [OLDER, "unset"]), ("", ["", ""])])
def test_what_grpc_sees_when_it_is_imported(program: str, given: str | None, seen: list[str]) -> None:
    env = {name: value for name, value in os.environ.items() if name != VARIABLE}
    env |= {} if given is None else {VARIABLE: given}
    command = [sys.executable, "-c", WATCHED, f"{program}.__main__", VARIABLE]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines() == seen
