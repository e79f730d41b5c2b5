"""Phases go to whoever holds the ready pipe, from this node alone, and to nobody once it is closed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from megatoken.process import start_phase
from megatoken.process.start_phase import ASKED, VARIABLE, begin_phase, share_phases


@pytest.fixture(autouse=True)
def _it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, ASKED[VARIABLE])


def test_each_phase_is_a_line_and_a_closed_pipe_takes_none() -> None:
    reading, writing = os.pipe()
    share_phases(writing)
    begin_phase("import")
    begin_phase("weights")
    os.close(writing)
    begin_phase("warm up")
    with os.fdopen(reading) as pipe:
        assert [json.loads(line) for line in pipe] == [{"start_phase": "import"}, {"start_phase": "weights"}]


def test_another_node_has_other_processes_under_these_pids(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    share_phases(writing)
    monkeypatch.setattr(start_phase, "_namespace", lambda: "elsewhere")
    begin_phase("import")
    os.close(writing)
    with os.fdopen(reading) as pipe:
        assert pipe.read() == ""


def test_what_is_no_pipe_is_left_alone(tmp_path: Path) -> None:
    """The descriptor's number may have become another file's."""
    with (tmp_path / "log").open("w") as log:
        log.write("kept")
        log.flush()
        share_phases(log.fileno())
        begin_phase("import")
    assert (tmp_path / "log").read_text() == "kept"


@pytest.mark.parametrize("asked", [None, ""])
def test_who_did_not_ask_gets_the_ready_line_alone(monkeypatch: pytest.MonkeyPatch, asked: str | None) -> None:
    if asked is None:
        monkeypatch.delenv(VARIABLE)
    else:
        monkeypatch.setenv(VARIABLE, asked)
    reading, writing = os.pipe()
    share_phases(writing)
    begin_phase("import")
    os.close(writing)
    with os.fdopen(reading) as pipe:
        assert pipe.read() == ""


def test_without_a_ready_pipe_nothing_is_told() -> None:
    share_phases(None)
    begin_phase("import")
