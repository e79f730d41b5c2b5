"""tests/support/processes.py: programs that are started at the same time do not get each other's config."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support import processes as module
from tests.support.processes import Processes


def test_two_starts_at_once_have_a_config_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(2, timeout=10)

    class Program:
        """Reads its config once both were started."""

        pid = returncode = 0

        def __init__(self, command: list[str], **_: Any) -> None:
            together.wait()
            self.config = json.loads(Path(command[command.index("--config") + 1]).read_text())
            together.wait()

    monkeypatch.setattr(module.subprocess, "Popen", Program)
    monkeypatch.setattr(module, "read_ready", lambda *_: {})
    for processes in (Processes(tmp_path), Processes(tmp_path)):  # the second finds the files of the first
        with ThreadPoolExecutor(2) as pool:
            started = list(pool.map(lambda name, p=processes: p.start("worker", {"replica": name}), ("v0", "v1")))
        assert [one.process.config["replica"] for one in started] == ["v0", "v1"]  # type: ignore[attr-defined]
        assert len({one.log for one in started}) == 2
    assert len(list(tmp_path.glob("*.json"))) == 4
    assert {file.stat().st_mode & 0o777 for file in tmp_path.glob("*.json")} == {0o600}
