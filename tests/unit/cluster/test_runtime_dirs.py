"""Files of a cluster lie where nobody else can exchange them, and its state where no cleaner of /tmp removes it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from megatoken.cluster.client.control import CommandError
from megatoken.cluster.client.progress import Progress
from megatoken.cluster.ray.child import Child, Launch
from megatoken.cluster.runtime_dirs import UnsafeDirectory, make_private, runtime_root, state_path
from megatoken.cluster.spec.cluster import ClusterSpec
from megatoken.cluster.start.bring_up import bring_up


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A directory like /tmp."""
    path = tmp_path / "shared"
    path.mkdir()
    path.chmod(0o1777)
    return path


def test_what_is_made_is_for_one_user_alone(shared: Path) -> None:
    old = os.umask(0)
    try:
        made = make_private(shared / "megatoken-1" / "c")
    finally:
        os.umask(old)
    assert [path.stat().st_mode & 0o777 for path in (made, made.parent)] == [0o700, 0o700]
    assert make_private(made) == made, "a second time changes nothing"


@pytest.mark.parametrize("mode", [0o777, 0o720, 0o702])
def test_a_directory_that_others_may_write_is_refused(shared: Path, mode: int) -> None:
    root = shared / "megatoken-1"
    root.mkdir()
    root.chmod(mode)
    for path in (root, root / "c" / "logs"):
        with pytest.raises(UnsafeDirectory, match=rf"^{root}: others may write there \(mode {mode:o}\)"):
            make_private(path)


def test_a_directory_of_somebody_else_is_refused(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = shared / "megatoken-1"
    root.mkdir(mode=0o700)
    owner = os.geteuid()
    monkeypatch.setattr("os.geteuid", lambda: owner + 1)
    for path in (root, root / "c"):
        with pytest.raises(UnsafeDirectory, match=f"^{root}: it belongs to user {owner};"):
            make_private(path)


def test_a_link_that_somebody_left_is_not_followed(shared: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (shared / "megatoken-1").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafeDirectory, match="it is not a directory"):
        make_private(shared / "megatoken-1")
    with pytest.raises(UnsafeDirectory, match="it is not a directory"):
        make_private(shared / "megatoken-1" / "c")


def test_up_refuses_an_unsafe_runtime_directory_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(0o777)
    monkeypatch.setenv("MEGATOKEN_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("MEGATOKEN_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setattr("megatoken.cluster.start.bring_up._Started", lambda *_: pytest.fail("it went on"))
    with pytest.raises(CommandError, match="others may write there"):
        bring_up(ClusterSpec(cluster="c"), Progress(), attached=False)


def test_a_process_of_the_cluster_does_not_start_over_somebodys_directory(shared: Path) -> None:
    root = shared / "megatoken-1"
    root.mkdir()
    root.chmod(0o777)
    child = Child(Launch("router-0", "router", {}, str(root / "c" / "0123"), {}))
    assert "others may write there" in child.wait_change(0, 10.0).reason
    assert not (root / "c").exists()


def test_the_state_outlives_what_is_cleaned_and_runtime_files_lie_with_the_user(tmp_path: Path) -> None:
    home = {"HOME": "/h", "XDG_RUNTIME_DIR": str(tmp_path)}
    assert state_path(home, "c") == Path("/h/.local/state/megatoken/c/controller.sqlite")
    assert state_path({**home, "XDG_STATE_HOME": "/x"}, "c") == Path("/x/megatoken/c/controller.sqlite")
    assert state_path({**home, "MEGATOKEN_RUNTIME_DIR": "/r"}, "c") == Path("/r/c/controller.sqlite")
    below_tmp = Path(tempfile.gettempdir()) / f"megatoken-{os.getuid()}"
    assert runtime_root(home) == tmp_path / "megatoken"
    assert runtime_root(home, local=False) == below_tmp, "other machines may have no session of the user"
    assert runtime_root({"XDG_RUNTIME_DIR": str(tmp_path / "gone")}) == below_tmp
