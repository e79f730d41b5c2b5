"""Files are known by content, hashed once, and the first that differs is named with its place."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from megatoken.errors import RequestError
from megatoken.worker.engines.weights import check_same, check_sums, difference, manifest_of


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    for name, text in {"b.safetensors": "bbb", "a.safetensors": "aaa", "config.json": "{}", "README.md": "#"}.items():
        (directory / name).write_text(text)
    (directory / "onnx").mkdir()
    return directory


def test_what_an_engine_reads_is_hashed_and_nothing_else(model: Path, tmp_path: Path) -> None:
    expected = {"a.safetensors": sha("aaa"), "b.safetensors": sha("bbb"), "config.json": sha("{}")}
    assert manifest_of(model, tmp_path / "notes") == expected


def test_a_file_is_hashed_again_only_when_it_changed(model: Path, tmp_path: Path) -> None:
    notes, hashed = tmp_path / "notes", list[str]()
    manifest_of(model, notes, hashed.append)
    assert hashed == ["a.safetensors", "b.safetensors", "config.json"]
    hashed.clear()
    manifest_of(model, notes, hashed.append)
    assert hashed == []
    (model / "b.safetensors").write_text("BBB")
    (model / "config.json").unlink()
    assert manifest_of(model, notes, hashed.append) == {"a.safetensors": sha("aaa"), "b.safetensors": sha("BBB")}
    assert hashed == ["b.safetensors"]


@pytest.mark.parametrize("damage", ["{", "[1]", '{"a.safetensors": 3}'])
def test_damaged_notes_cost_a_reading_and_no_error(model: Path, tmp_path: Path, damage: str) -> None:
    notes = tmp_path / "notes"
    first = manifest_of(model, notes)
    (note,) = notes.iterdir()
    note.write_text(damage)
    assert manifest_of(model, notes) == first


def test_notes_that_cannot_be_written_are_done_without(model: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("a file")
    assert len(manifest_of(model, tmp_path / "notes")) == 3


def test_sums_beside_the_weights_must_hold(model: Path, tmp_path: Path) -> None:
    found = manifest_of(model, tmp_path / "notes")
    check_sums(model, found)
    sums = [f"{sha('aaa')}  a.safetensors", f"{sha('bbb').upper()} *b.safetensors", f"{sha('x')}  README.md"]
    (model / "SHA256SUMS").write_text("\n".join(sums) + "\n")
    check_sums(model, found)
    (model / "SHA256SUMS").write_text(f"{sha('aaa')}  a.safetensors\n{sha('other')}  b.safetensors\n")
    host = os.uname().nodename
    rule = f"has SHA-256 {sha('other')[:12]}, here it is SHA-256 {sha('bbb')[:12]} on {host}"
    with pytest.raises(RequestError, match=r"b.safetensors' is not allowed; the directory's SHA256SUMS " + rule):
        check_sums(model, found)
    (model / "SHA256SUMS").write_text(f"{sha('ccc')}  c.safetensors\n")
    with pytest.raises(RequestError, match=r"c.safetensors.*here it is missing"):
        check_sums(model, found)


def test_of_two_snapshots_the_commit_and_the_files_that_both_have_must_be_the_same(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--m" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "a.safetensors").write_text("aaa")
    found = manifest_of(snapshot, tmp_path / "notes")
    assert found == {"commit": "abc", "a.safetensors": sha("aaa")}
    check_same("/s", found, {**found, "tokenizer.json": sha("t")}, "m-1 on node0")
    check_same("/s", {**found, "tokenizer.json": sha("t")}, found, "m-1 on node0")
    with pytest.raises(RequestError, match=r"'/s/a.safetensors' is not allowed; m-1 on node0 has SHA-256"):
        check_same("/s", found, {**found, "a.safetensors": sha("b")}, "m-1 on node0")
    with pytest.raises(
        RequestError, match=r"'/s/commit' is not allowed; m-1 on node0 has commit def, here it is commit abc"
    ):
        check_same("/s", found, {**found, "commit": "def"}, "m-1 on node0")
    with pytest.raises(RequestError, match=r"m-1 on node0 has SHA-256 .*, here it is missing"):
        check_same("/s", {}, found, "m-1 on node0")


def test_two_nodes_must_have_the_same() -> None:
    ours = {"a": sha("1"), "b": sha("2")}
    check_same("/m", ours, {}, "")
    check_same("/m", ours, dict(ours), "m-1 on node0")
    with pytest.raises(RequestError, match=r"weights: '/m/b' is not allowed; m-1 on node0 has SHA-256"):
        check_same("/m", ours, {**ours, "b": sha("3")}, "m-1 on node0")
    with pytest.raises(RequestError, match=r"'/m/b' is not allowed; m-1 on node0 has no such file"):
        check_same("/m", ours, {"a": sha("1")}, "m-1 on node0")
    assert difference(ours, {**ours, "c": sha("4")}) == "c"
