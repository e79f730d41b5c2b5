"""Which rank an engine core says that it lost, whoever ends it first."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatoken.worker.engines.ranks import executor
from megatoken.worker.engines.ranks.executor import MortalExecutor


class Ranks:
    """Stands where vLLM's executor stands: its shutdown ends every rank."""

    def __init__(self) -> None:
        self.ended: list[int] = []
        self.is_failed = False

    def shutdown(self) -> None:
        self.ended = [0, 1, 2, 3]


class Executor(MortalExecutor, Ranks):
    def lost_ranks(self) -> list[int]:
        return self.ended


@pytest.fixture
def loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEGATOKEN_LOST_RANKS", str(tmp_path / "loss"))
    monkeypatch.setattr(executor, "_end_process", lambda: None)
    return tmp_path / "loss"


def test_an_orderly_end_names_no_rank_although_all_end(loss: Path) -> None:
    ranks = Executor()
    ranks.shutdown()
    assert not loss.exists()


def test_the_first_to_end_is_named_and_not_those_that_are_ended_for_it(loss: Path) -> None:
    ranks = Executor()
    ranks.ended = [3]
    ranks.shutdown()  # the engine core's, on an error of another rank
    ranks.is_failed = True
    ranks.shutdown()  # the monitor's, a moment later
    assert loss.read_text() == "3"


def test_the_news_of_a_death_may_come_after_the_errors_that_it_caused(loss: Path) -> None:
    class Late(Executor):
        looks = 0

        def lost_ranks(self) -> list[int]:
            self.looks += 1
            return [3] if self.looks > 4 else []

        def ended_ranks(self) -> list[int]:
            return [0]  # of an error: its peer's connection was reset

    try:
        raise RuntimeError("Connection reset by peer")
    except RuntimeError:
        Late().shutdown()
    assert loss.read_text() == "3"


def test_when_no_rank_is_known_to_have_died_those_that_ended_are_named(
    loss: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ended(Executor):
        def ended_ranks(self) -> list[int]:
            return [0, 2]

    monkeypatch.setattr(executor, "LOSS_S", 0.1)
    ranks = Ended()
    ranks.is_failed = True
    ranks.shutdown()
    assert loss.read_text() == "0 2"
