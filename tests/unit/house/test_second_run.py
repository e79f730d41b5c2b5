"""What failed runs a second time, and the fleet's steps only together: each rests on those before it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import conftest

STEPS = """
from pathlib import Path

def test_first():
    assert True

def test_second():
    assert Path("second_run").exists()

def test_third():
    assert True
"""
OTHER = "def test_good():\n    assert True\n\n\ndef test_bad():\n    assert False\n"


@pytest.mark.parametrize("shared_out", [[], ["-n", "2"]])
def test_all_steps_of_the_fleet_run_again_where_one_failed_and_elsewhere_only_what_failed(
    tmp_path: Path, shared_out: list[str]
) -> None:
    fleet, other = tmp_path / conftest.ALONE, tmp_path / "tests/unit/test_other.py"
    for path, text in ((fleet, STEPS), (other, OTHER)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    shutil.copy(conftest.__file__, tmp_path / "tests/conftest.py")

    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "pytest", "tests", *arguments]
        alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        return subprocess.run(
            command, cwd=tmp_path, env=alone, capture_output=True, text=True, timeout=60, check=False
        ).stdout

    assert "2 failed, 3 passed" in run(*shared_out)
    (tmp_path / "second_run").touch()
    assert "1 failed, 3 passed" in run("--last-failed")
