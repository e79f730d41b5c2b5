"""Tokens are told by hash, made only from the secret, and rotated without a moment in which a good one is refused."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest

from megatoken.access.credentials import ClusterSecrets, dump, identify, new_secrets
from megatoken.access.files import CHECK_S, CredentialsFile, read_private, write_private
from megatoken.access.table import METHODS, TOKENED, Identity, Program, known_to
from megatoken.errors import RequestError


def test_a_process_knows_its_own_token_and_others_by_hash_only() -> None:
    cluster = new_secrets()
    worker = cluster.credentials(Identity.WORKER, Program.WORKER, "chat-1")
    assert worker.token == cluster.token(Identity.WORKER)
    text = dump(worker)
    for other in set(TOKENED) - {Identity.WORKER}:
        assert cluster.token(other) not in text
    assert cluster.secrets[0] not in text
    assert cluster.token(Identity.WORKER) not in repr(worker), "a log line must not show it"
    assert cluster.secrets[0] not in repr(cluster)


@pytest.mark.parametrize("program", METHODS)
def test_a_process_can_tell_exactly_the_identities_that_its_methods_name(program: Program) -> None:
    cluster = new_secrets()
    credentials = cluster.credentials(Identity.AGENT, program)
    for identity in TOKENED:
        told = identify(credentials, cluster.token(identity))
        assert told == (identity if identity in known_to(program) else None)
    assert identify(credentials, "") is None
    assert identify(credentials, "megatoken-operator-" + "0" * 64) is None
    assert identify(credentials, new_secrets().token(Identity.OPERATOR)) is None, "another cluster's"


def test_every_step_of_a_rotation_accepts_what_any_process_may_still_show() -> None:
    old = new_secrets()
    steps = [old, (begun := old.begun()), begun.switched(), begun.switched().ended()]
    pairs = list(itertools.pairwise(steps))
    for one, other in [*pairs, *((b, a) for a, b in pairs)]:
        # two processes are at most one step apart: the next step waits until all have the last
        accepted = other.credentials(Identity.CONTROLLER, Program.CONTROLLER)
        assert identify(accepted, one.token(Identity.OPERATOR)) is Identity.OPERATOR
    ended = steps[-1].credentials(Identity.CONTROLLER, Program.CONTROLLER)
    assert identify(ended, old.token(Identity.OPERATOR)) is None
    assert steps[-1].token(Identity.OPERATOR) != old.token(Identity.OPERATOR)
    assert [step.rotating for step in steps] == [False, True, True, False]


def test_a_worker_has_lease_keys_of_its_own_replica_only() -> None:
    cluster = new_secrets()
    one = cluster.credentials(Identity.WORKER, Program.WORKER, "chat-1").lease_keys
    other = cluster.credentials(Identity.WORKER, Program.WORKER, "chat-2").lease_keys
    assert len(one) == len(other) == 1
    assert one != other
    assert cluster.credentials(Identity.ROUTER, Program.ROUTER).lease_keys not in (one, other)
    assert cluster.credentials(Identity.AGENT, Program.AGENT).lease_keys == ()
    begun = cluster.begun()
    assert begun.credentials(Identity.WORKER, Program.WORKER, "chat-1").lease_keys[0] == one[0], "the shown one signs"


def write(path: Path, cluster: ClusterSecrets) -> None:
    write_private(path, dump(cluster.credentials(Identity.ROUTER, Program.WORKER, "chat-1")))


def test_a_changed_file_is_in_force_soon_and_an_unreadable_one_changes_nothing(tmp_path: Path) -> None:
    path, now = tmp_path / "credentials.json", [0.0]
    cluster, newer = new_secrets(), new_secrets()
    write(path, cluster)
    assert path.stat().st_mode & 0o777 == 0o600
    held = CredentialsFile(path, lambda: now[0])
    assert held.identify(cluster.token(Identity.ROUTER)) is Identity.ROUTER
    write(path, newer)
    now[0] += CHECK_S
    assert held.metadata() == (("megatoken-credential", newer.token(Identity.ROUTER)),)
    assert held.identify(cluster.token(Identity.ROUTER)) is None
    path.unlink()
    now[0] += CHECK_S
    assert held.current.token == newer.token(Identity.ROUTER)
    path.write_text("{}")
    path.chmod(0o600)
    now[0] += CHECK_S
    assert held.current.token == newer.token(Identity.ROUTER)
    write(path, cluster)
    now[0] += 0.5  # less than CHECK_S, but an unknown token is worth a look
    assert held.identify(cluster.token(Identity.ROUTER)) is Identity.ROUTER


def test_a_file_that_others_may_read_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "operator.token"
    write_private(path, "secret")
    assert read_private(path, "--token-file") == "secret"
    os.chmod(path, 0o640)
    with pytest.raises(RequestError, match=r"^--token-file: .*operator.token.*chmod 600"):
        read_private(path, "--token-file")
    with pytest.raises(RequestError, match="No such file"):
        read_private(tmp_path / "none", "--token-file")
