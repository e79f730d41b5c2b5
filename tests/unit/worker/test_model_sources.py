"""What a source names, and what is said when it names nothing. Converts nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatoken.errors import RequestError
from megatoken.worker import models


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEGATOKEN_CACHE", str(tmp_path))
    return tmp_path / "models"


def test_a_made_model_is_found_at_once(cache: Path) -> None:
    (cache / models.TINY_LLAMA).mkdir(parents=True)
    assert models.resolve_source("builtin:tiny-llama") == str(cache / models.TINY_LLAMA)


def test_an_unknown_builtin_names_the_known_ones() -> None:
    with pytest.raises(RequestError, match=r"builtin:smollm2-135m-instruct.*builtin:tiny-llama"):
        models.resolve_source("builtin:gpt")


def test_paths_must_exist_and_ids_pass_through(tmp_path: Path) -> None:
    assert models.resolve_source(str(tmp_path)) == str(tmp_path)
    assert models.resolve_source("org/model") == "org/model"
    with pytest.raises(RequestError, match="a directory"):
        models.resolve_source("/no/such/model")


def test_a_failed_conversion_leaves_nothing_behind(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(directory: Path, report: models.Report) -> None:
        (directory / "half").write_text("x")
        raise OSError("disk full")

    monkeypatch.setattr(models, "_convert_smollm2", fail)
    with pytest.raises(OSError, match="disk full"):
        models.prepare(models.SMOLLM2, lambda line: None)
    assert [path.name for path in cache.iterdir()] == [f"{models.SMOLLM2}.lock"]


def test_the_conversion_is_renamed_into_place_whole(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def convert(directory: Path, report: models.Report) -> None:
        calls.append(directory)
        (directory / "config.json").write_text("{}")

    monkeypatch.setattr(models, "_convert_smollm2", convert)
    lines: list[str] = []
    for _ in range(2):
        path = models.prepare(models.SMOLLM2, lines.append)
    assert (path / "config.json").read_text() == "{}"
    assert len(calls) == 1
    assert len(lines) == 1


def test_the_command_line(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cache / models.TINY_LLAMA).mkdir(parents=True)
    assert models.main(["path", "tiny-llama"]) == 0
    assert capsys.readouterr().out.strip() == str(cache / models.TINY_LLAMA)
    assert models.main(["prepare", "gpt"]) == 2
    assert models.main([]) == 2
