"""Files that arrive in pieces: whole or not at all, and on from where they stopped."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from megatoken.cluster.fetch.directory import ModelDirectory
from megatoken.cluster.fetch.plan import FileContent, part_name
from megatoken.worker.engines.weights import manifest_of

DATA = os.urandom(1000)
CONTENT = FileContent(len(DATA), hashlib.sha256(DATA).hexdigest())
NAME = "model.safetensors"


@pytest.fixture
def arriving(tmp_path: Path) -> ModelDirectory:
    return ModelDirectory(str(tmp_path / "deep" / "m"), tmp_path / "notes")


def test_a_directory_tells_its_files_by_content_and_nothing_hidden(tmp_path: Path) -> None:
    root = tmp_path / "m"
    for name in (NAME, "1_Pooling/config.json", ".cache/x", ".git", "merges.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(DATA)
    hashed: list[str] = []
    directory = ModelDirectory(str(root), tmp_path / "notes")
    assert directory.files(hashed.append) == dict.fromkeys(["1_Pooling/config.json", "merges.txt", NAME], CONTENT)
    assert sorted(hashed) == ["1_Pooling/config.json", "merges.txt", NAME]
    assert ModelDirectory(str(root), tmp_path / "notes").files(hashed.append)[NAME] == CONTENT
    assert len(hashed) == 3, "each is hashed once a node"


def test_of_the_hubs_cache_the_commit_that_a_branch_names_is_told_and_arrives(tmp_path: Path) -> None:
    cache = tmp_path / "hub"
    root = cache / "models--org--m"
    for name in ("blobs/1234", "refs/old", "snapshots/c1/config.json"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(DATA)
    (root / "refs/main").write_text("c2")
    (root / "snapshots/c2").mkdir()
    (root / "snapshots/c2" / NAME).symlink_to(root / "blobs/1234")
    main = FileContent(2, hashlib.sha256(b"c2").hexdigest())
    directory = ModelDirectory(f"{root}@main", tmp_path / "notes")
    assert directory.files() == {"refs/main": main, f"snapshots/c2/{NAME}": CONTENT}
    assert ModelDirectory(f"{root}@c1", tmp_path / "notes").files() == {"snapshots/c1/config.json": CONTENT}
    assert ModelDirectory(f"{root}@nothing", tmp_path / "notes").files() == {}

    arriving = ModelDirectory(f"{tmp_path}/other/models--org--m@main", tmp_path / "notes")
    arriving.write("refs/main", main, 0, b"c2")
    arriving.write(f"snapshots/c2/{NAME}", CONTENT, 0, DATA)
    assert arriving.files() == directory.files()


def test_one_that_is_not_there_has_nothing_and_knows_the_room(arriving: ModelDirectory, tmp_path: Path) -> None:
    assert (arriving.files(), arriving.parts()) == ({}, {})
    status = os.statvfs(tmp_path)
    assert abs(arriving.free_bytes() - status.f_bavail * status.f_frsize) < 1 << 30


def test_a_file_takes_its_place_when_all_of_it_is_there(arriving: ModelDirectory, tmp_path: Path) -> None:
    place = tmp_path / "deep/m" / NAME
    assert [arriving.write(NAME, CONTENT, at, DATA[at : at + 300]) for at in (0, 300, 600)] == [300, 600, 900]
    assert not place.exists()
    assert arriving.parts() == {part_name(NAME, CONTENT): 900}
    assert arriving.write(NAME, CONTENT, 900, DATA[900:]) == 1000
    assert place.read_bytes() == DATA
    assert arriving.parts() == {}
    hashed: list[str] = []
    assert manifest_of(place.parent, tmp_path / "notes", hashed.append) == {NAME: CONTENT.sha256}
    assert hashed == [], "an engine's start need not hash it again"


def test_what_was_cut_off_goes_on_where_it_stopped(tmp_path: Path) -> None:
    (tmp_path / "deep" / "m").mkdir(parents=True)
    (tmp_path / "deep" / "m" / part_name(NAME, CONTENT)).write_bytes(DATA[:400])
    again = ModelDirectory(str(tmp_path / "deep" / "m"), tmp_path / "notes")
    assert again.write(NAME, CONTENT, 300, DATA[300:700]) == 700, "what it has is not taken twice"
    assert again.write(NAME, CONTENT, 0, DATA[:300]) == 700
    assert again.write(NAME, CONTENT, 900, DATA[900:]) == 700, "no gaps"
    assert again.write(NAME, CONTENT, 700, DATA[700:]) == 1000
    assert (tmp_path / "deep/m" / NAME).read_bytes() == DATA


def test_another_content_than_promised_is_dropped(arriving: ModelDirectory, tmp_path: Path) -> None:
    (tmp_path / "deep/m").mkdir(parents=True)
    (tmp_path / "deep/m" / NAME).write_bytes(b"old")
    with pytest.raises(ValueError, match="arrived with SHA-256"):
        arriving.write(NAME, CONTENT, 0, DATA[:-1] + bytes([DATA[-1] ^ 1]))
    assert (tmp_path / "deep/m" / NAME).read_bytes() == b"old"
    assert arriving.parts() == {}
    assert arriving.write(NAME, CONTENT, 0, DATA) == 1000
    assert (tmp_path / "deep/m" / NAME).read_bytes() == DATA


def test_a_part_longer_than_the_file_begins_anew(arriving: ModelDirectory, tmp_path: Path) -> None:
    part = tmp_path / "deep/m" / part_name(NAME, CONTENT)
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * 2000)
    assert arriving.write(NAME, CONTENT, 0, DATA) == 1000


def test_a_file_without_bytes_arrives_too(arriving: ModelDirectory, tmp_path: Path) -> None:
    assert arriving.write("empty.txt", FileContent(0, hashlib.sha256().hexdigest()), 0, b"") == 0
    assert (tmp_path / "deep/m/empty.txt").read_bytes() == b""


def test_two_fetches_at_once_do_not_mix(arriving: ModelDirectory, tmp_path: Path) -> None:
    arriving.write(NAME, CONTENT, 0, DATA[:400])
    other = ModelDirectory(str(tmp_path / "deep" / "m"), tmp_path / "notes")
    with pytest.raises(OSError, match="another fetch writes"):
        other.write(NAME, CONTENT, 400, DATA[400:])


def test_a_full_disk_is_told_and_what_came_before_is_kept(
    arriving: ModelDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arriving.write(NAME, CONTENT, 0, DATA[:400])
    incoming: Any = arriving._incoming[NAME]

    class Full:
        def write(self, _data: bytes) -> int:
            raise OSError(28, "No space left on device")

        def close(self) -> None:
            file.close()

    file, incoming.file = incoming.file, Full()
    with pytest.raises(OSError, match="No space left"):
        arriving.write(NAME, CONTENT, 400, DATA[400:])
    assert arriving.write(NAME, CONTENT, 400, DATA[400:]) == 1000
    assert (tmp_path / "deep/m" / NAME).read_bytes() == DATA


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x"])
def test_no_file_leaves_the_directory(arriving: ModelDirectory, name: str) -> None:
    with pytest.raises(ValueError, match="is not allowed"):
        arriving.write(name, CONTENT, 0, DATA)
    with pytest.raises(ValueError, match="is not allowed"):
        arriving.read(name, 0, 1)


def test_pieces_are_read_from_where_one_asks(arriving: ModelDirectory, tmp_path: Path) -> None:
    root = tmp_path / "deep/m"
    root.mkdir(parents=True)
    (root / "a").write_bytes(DATA)
    (root / "b").write_bytes(b"other")
    assert [arriving.read("a", 0, 10), arriving.read("b", 0, 9), arriving.read("a", 990, 50)] == [
        DATA[:10], b"other", DATA[990:]
    ]  # fmt: skip
