"""Where the ranks of a node have their sockets, when the engine core is on another node."""

from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from megatoken.worker.engines.ranks.ray_executor import sockets_on


def test_ranks_beside_the_engine_core_share_its_folder(tmp_path: Path) -> None:
    driver = tmp_path / "aaaa"
    driver.mkdir()
    (tmp_path / "bbbb").mkdir()
    assert sockets_on(driver, "bbbb77") == str(driver)


def test_ranks_elsewhere_use_the_folder_of_their_own_node(tmp_path: Path) -> None:
    (tmp_path / "bbbb").mkdir()
    (tmp_path / "cccc").mkdir()
    assert sockets_on(tmp_path / "aaaa", "bbbb77") == str(tmp_path / "bbbb")


def test_a_node_without_a_folder_has_them_where_temporary_files_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: "/elsewhere")
    assert sockets_on(tmp_path / "aaaa", "bbbb77") == "/elsewhere"
