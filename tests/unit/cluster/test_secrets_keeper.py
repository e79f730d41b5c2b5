"""Secrets outlive a controller, and a rotation takes its steps only when every process has the last one."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from megatoken.access.credentials import identify
from megatoken.access.table import Identity
from megatoken.cluster.secrets_keeper import OVERLAP_S, PATIENCE_S, SecretsKeeper, process_credentials
from megatoken.errors import RequestError, UnavailableError


def accepts(keeper: SecretsKeeper, token: str) -> bool:
    credentials = process_credentials(keeper.current, "router", "router-0")
    assert credentials is not None
    return identify(credentials, token) is Identity.OPERATOR


def tell(keeper: SecretsKeeper, *names: str) -> None:
    keeper.told(names, keeper.current)


def test_a_restarted_controller_has_the_same_secrets_and_tells_everybody(tmp_path: Path) -> None:
    keeper = SecretsKeeper(tmp_path)
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in tmp_path.iterdir())
    assert keeper.untold(["a", "b"]) == ["a", "b"]
    tell(keeper, "a", "b")
    assert keeper.untold(["a", "b"]) == []
    again = SecretsKeeper(tmp_path)
    assert again.current == keeper.current
    assert again.untold(["a"]) == ["a"]


def test_a_spoilt_file_means_new_secrets_and_a_public_one_an_error(tmp_path: Path) -> None:
    first = SecretsKeeper(tmp_path)
    (tmp_path / "cluster.secrets").write_text('{"secrets": [')
    assert SecretsKeeper(tmp_path).current != first.current
    (tmp_path / "cluster.secrets").chmod(0o644)
    with pytest.raises(RequestError, match="chmod 600"):
        SecretsKeeper(tmp_path)


def test_a_rotation_waits_for_every_process_at_each_step(tmp_path: Path) -> None:
    keeper = SecretsKeeper(tmp_path)
    tell(keeper, "router-0", "chat-1")
    old = keeper.operator_token
    keeper.rotate()
    with pytest.raises(UnavailableError, match="being changed already"):
        keeper.rotate()
    keeper.advance(["router-0", "chat-1"], 0.0)
    assert keeper.operator_token == old, "nobody has heard of the new one yet"
    tell(keeper, "router-0")
    keeper.advance(["router-0", "chat-1"], 1.0)
    assert keeper.operator_token == old
    tell(keeper, "chat-1")
    keeper.advance(["router-0", "chat-1"], 2.0)
    new = keeper.operator_token
    assert new != old
    assert accepts(keeper, old)
    assert accepts(keeper, new)
    tell(keeper, "router-0", "chat-1")
    keeper.advance(["router-0", "chat-1"], 2.0 + OVERLAP_S - 0.1)
    assert accepts(keeper, old)
    keeper.advance(["router-0", "chat-1"], 2.0 + OVERLAP_S)
    assert not accepts(keeper, old)
    assert accepts(keeper, new)
    assert keeper.untold(["router-0", "chat-1"]) == ["chat-1", "router-0"], "and they are told that the old one is over"


def test_a_rotation_goes_on_past_a_controllers_death_and_a_process_out_of_reach(tmp_path: Path) -> None:
    keeper = SecretsKeeper(tmp_path)
    old = keeper.operator_token
    keeper.rotate()
    again = SecretsKeeper(tmp_path)
    again.advance(["chat-1"], 0.0)
    again.advance(["chat-1"], PATIENCE_S)
    assert again.operator_token != old
    third = SecretsKeeper(tmp_path)
    third.advance(["chat-1"], 100.0)
    third.advance(["chat-1"], 100.0 + OVERLAP_S)
    assert accepts(third, old), "one more chance for the process that has not answered"
    third.advance(["chat-1"], 100.0 + OVERLAP_S + PATIENCE_S)
    assert not accepts(third, old)
    assert third.untold(["chat-1"]) == ["chat-1"], "told when it answers again"


def test_a_restarted_controller_writes_nothing_that_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = SecretsKeeper(tmp_path)

    def full(_path: Path, _text: str) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr("megatoken.cluster.secrets_keeper.write_private", full)
    assert SecretsKeeper(tmp_path).current == first.current
    with pytest.raises(OSError, match="no space"):
        first.rotate()
    assert not first.current.rotating, "what could not be written down is not in force"
