"""Each transcript, replayed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.transcripts.kinds import KINDS, transcripts
from tests.transcripts.transcript import Command, blocks, replay


@pytest.mark.parametrize("path", [pytest.param(path, id=f"{path.parent.name}-{path.stem}") for path in transcripts()])
def test_the_commands_give_what_is_written(path: Path) -> None:
    assert replay(path, KINDS[path.parent.name]().run) == path.read_text()


def test_there_are_transcripts_of_every_kind() -> None:
    assert {path.parent.name for path in transcripts()} == set(KINDS)


def test_a_block_is_comments_and_commands_and_what_they_gave_is_not_run() -> None:
    text = "# why\nadd a n=1\nadd b\n----\nsomething\n\n# the end\n"
    assert list(blocks(text)) == [(["# why"], ["add a n=1", "add b"]), (["# the end"], [])]
    assert Command.of_line("add 'a b' n=1") == Command("add", ("a b",), {"n": "1"})


def test_another_outcome_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_text("say hello\n----\nhello\n")
    assert replay(path, lambda command: list(command.words)) == path.read_text()
    assert replay(path, lambda _: ["goodbye"]) != path.read_text()
