"""Numbers for people, and how far something is."""

from __future__ import annotations

import io
import sys

import pytest

from megatoken.cluster.client.progress import CLEAR, Progress
from megatoken.cluster.view.human import bar, gib


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0.0 GiB"), (1 << 20, "1.0 MiB"), ((1 << 30) - 1, "1024.0 MiB"), (1 << 30, "1.0 GiB"), (5 << 29, "2.5 GiB")],
)
def test_sizes(size: int, text: str) -> None:
    assert gib(size) == text


@pytest.mark.parametrize(
    ("done", "total", "text"),
    [(0, 8, "[----] 0 %"), (3, 8, "[#---] 38 %"), (8, 8, "[####] 100 %"), (0, 0, "[####] 100 %")],
)
def test_bars(done: int, total: int, text: str) -> None:
    assert bar(done, total, width=4) == text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_stays_on_its_line_until_something_else_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    progress = Progress()
    progress.bar("[#---] 25 %")
    progress.bar("[##--] 50 %")  # too soon after the first
    progress.say("done")
    progress.say("more")
    first, second = shown.getvalue().rstrip("\n").split("\n")
    assert first.split(CLEAR) == ["", "[   0.0 s] [#---] 25 %", "[   0.0 s] done"]
    assert second == "[   0.0 s] more"


def test_the_last_bar_is_taken_away_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    progress = Progress()
    progress.end_bar()
    progress.bar("[####] 100 %")
    progress.end_bar()
    progress.end_bar()
    assert shown.getvalue() == f"{CLEAR}[   0.0 s] [####] 100 %{CLEAR}"


def test_without_a_terminal_a_bar_is_a_sign_of_life_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    Progress().bar("[#---] 25 %")
    assert shown.getvalue() == ""
