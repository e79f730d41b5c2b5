"""Lifecycle of logs, records, choices of a cluster: the small parts of the command line."""

import stat
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatoken.cluster.cli.__main__ import main
from megatoken.cluster.client.control import CommandError, choose
from megatoken.cluster.client.records import ClusterRecord, alive, read_records, write_record
from megatoken.cluster.controller.server import new_lines
from megatoken.cluster.runtime_dirs import node_directory, runtime_root, state_directory


def test_new_lines_are_those_after_what_was_shown() -> None:
    assert new_lines([], ["a", "b"]) == ["a", "b"]
    assert new_lines(["a", "b"], ["a", "b"]) == []
    assert new_lines(["a", "b"], ["b", "c"]) == ["c"]
    assert new_lines(["a", "b"], ["x", "y"]) == ["x", "y"]
    assert new_lines(["a"], []) == []
    assert new_lines(["a", "b", "a", "b"], ["a", "b"]) == []
    assert new_lines(["x", "a", "a"], ["a", "a", "a"]) == ["a"]


@given(st.lists(st.sampled_from("ab"), max_size=12), st.lists(st.sampled_from("ab"), max_size=12))
def test_new_lines_leave_out_the_longest_overlap(shown: list[str], now: list[str]) -> None:
    overlap = max(n for n in range(min(len(shown), len(now)) + 1) if shown[len(shown) - n :] == now[:n])
    assert new_lines(shown, now) == now[overlap:]


def test_following_a_long_log_takes_one_pass_over_it() -> None:
    crashes = ["the same line"] * 100_000
    started_s = time.process_time()
    assert new_lines([*crashes, "up again"], [*crashes, "down"]) == [*crashes, "down"]
    assert new_lines(crashes, [*crashes[1:], "up again"]) == ["up again"]
    assert time.process_time() - started_s < 3.0  # every overlap: some 10 s a call


def test_records_are_private_and_broken_ones_are_passed_over(tmp_path: Path) -> None:
    path = write_record(tmp_path / "s", ClusterRecord(cluster="one", control="h:1"))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    (tmp_path / "s" / "two.json").write_text("{")
    assert [record.cluster for record in read_records(tmp_path / "s")] == ["one"]
    assert read_records(tmp_path / "none") == []


def test_which_cluster_is_meant(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="no cluster is running"):
        choose(tmp_path, None, None)
    write_record(tmp_path, ClusterRecord(cluster="one", control="h:1"))
    assert choose(tmp_path, None, None).control == "h:1"
    write_record(tmp_path, ClusterRecord(cluster="two", control="h:2"))
    with pytest.raises(CommandError, match="several clusters run: one, two"):
        choose(tmp_path, None, None)
    assert choose(tmp_path, "two", None).control == "h:2"
    with pytest.raises(CommandError, match="'three' is not running"):
        choose(tmp_path, "three", None)
    assert choose(tmp_path, None, "far:7").control == "far:7"
    with pytest.raises(CommandError, match="HOST:PORT"):
        choose(tmp_path, None, "far")


def test_a_cluster_whose_guard_is_gone_does_not_run(tmp_path: Path) -> None:
    write_record(tmp_path, ClusterRecord(cluster="dead", control="h:1", guard_pid=2**22 - 1))
    assert not alive(2**22 - 1)
    with pytest.raises(CommandError, match="no cluster is running"):
        choose(tmp_path, None, None)


def test_directories_follow_the_environment() -> None:
    assert runtime_root({"MEGATOKEN_RUNTIME_DIR": "/r"}) == Path("/r")
    assert state_directory({"MEGATOKEN_STATE_DIR": "/s"}) == Path("/s")
    assert state_directory({"HOME": "/h"}) == Path("/h/.local/state/megatoken")
    assert node_directory(Path("/r"), "c", "0123456789abcdef") == Path("/r/c/0123456789ab")


def test_the_command_line_checks_a_spec_and_names_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text("cluster: c\nmodels: [{name: m, engine: simulated, replicas: 3}]")
    assert main(["validate", "-f", str(path)]) == 0
    assert "3 replicas on 3 devices" in capsys.readouterr().out
    path.write_text("models: [{name: m, engine: simulated, replicas: -3}]")
    assert main(["validate", "-f", str(path)]) == 2
    assert "megatoken: models.m.replicas: -3 is not allowed" in capsys.readouterr().err
    assert main(["validate", "-f", str(tmp_path / "none.yaml")]) == 2
    assert main([]) == 2
