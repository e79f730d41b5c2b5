"""Leases are signed for their replica, and settled by what its worker reports, whatever their client says."""

from __future__ import annotations

import hashlib
import json

import pytest

from megatoken.access.credentials import Credentials, new_secrets
from megatoken.access.lease import lease_id, verify
from megatoken.access.table import Identity, Program
from megatoken.errors import OverloadError, RequestError
from megatoken.router.identity.api_keys import ApiKey
from megatoken.router.identity.callers import Caller
from megatoken.router.intake.intake import on_frame
from megatoken.router.shell.leases import IssuedLeases, LeaseSigner
from megatoken.v1 import frame_columns_pb2, router_pb2, tokens_pb2
from tests.support.router_core import CoreFleet

ASK = router_pb2.AssignRequest(model="m", prompt_tokens=100, max_tokens=400)
UNIX_S = 5000.0


def caller(**limits: float) -> Caller:
    digest = hashlib.sha256(b"x").hexdigest()
    return Caller("a", ApiKey.model_validate({"name": "a", "sha256": digest, **limits}))


def world(**settings: object) -> tuple[CoreFleet, IssuedLeases]:
    fleet = CoreFleet(replicas=1, max_running=1000, **settings)
    leases = IssuedLeases(fleet.state)
    fleet.state.on_lease_usage = leases.report
    return fleet, leases


def report(fleet: CoreFleet, name: str, prompt_tokens: int, generated_tokens: int, replica: int = 0) -> None:
    usage = tokens_pb2.LeaseUsage(lease_id=name, prompt_tokens=prompt_tokens, generated_tokens=generated_tokens)
    frame = frame_columns_pb2.Frame(usage=[usage])
    on_frame(fleet.state, fleet.replicas[replica], frame.SerializeToString(), fleet.now)


def left(fleet: CoreFleet) -> float:
    """Tokens that the key may still use now."""
    tokens = fleet.state.callers._usage["a"].tokens
    assert tokens is not None
    return tokens.level


def test_a_release_refunds_nothing_and_teaches_nothing() -> None:
    fleet, leases = world()
    keyed = caller(tokens_per_minute=1000, concurrency=1)
    share = fleet.pool.output_share
    lease = leases.assign(ASK, keyed, 100.0)
    leases.release(lease.lease, False, 101.0)
    assert (len(leases), fleet.replicas[0].outstanding_tokens) == (0, 0)  # its place is free
    assert (left(fleet), fleet.pool.output_share) == (500, share)
    with pytest.raises(OverloadError, match="1 requests at once"):
        leases.assign(ASK, keyed, 101.0)


@pytest.mark.parametrize("released", [True, False])
def test_a_report_settles_a_lease_once(released: bool) -> None:
    fleet, leases = world()
    lease = leases.assign(ASK, caller(tokens_per_minute=1000, concurrency=1), 100.0)
    if released:
        leases.release(lease.lease, False, 101.0)
    for _ in range(2):
        report(fleet, lease.lease, 100, 40)
    leases.release(lease.lease, False, 102.0)
    assert (left(fleet), fleet.pool.output_share, len(leases)) == (860, 0.1, 0)
    assert fleet.state.callers._usage["a"].live == 0
    assert leases.ended == {"released": 1, "expired": 0, "failed": 0}
    fleet.check_idle()


def test_a_report_counts_from_the_lease_s_own_replica_alone() -> None:
    fleet = CoreFleet(replicas=2, max_running=1000)
    leases = IssuedLeases(fleet.state)
    fleet.state.on_lease_usage = leases.report
    lease = leases.assign(ASK, caller(tokens_per_minute=1000), 100.0)
    other = 1 if lease.replica == "m-0" else 0
    report(fleet, lease.lease, 1, 1, replica=other)
    report(fleet, "of another router", 1, 1)
    assert (left(fleet), len(leases)) == (500, 1)


def test_what_failed_by_its_client_s_word_is_settled_and_teaches_nothing() -> None:
    fleet, leases = world()
    share = fleet.pool.output_share
    lease = leases.assign(ASK, caller(tokens_per_minute=1000), 100.0)
    leases.release(lease.lease, True, 101.0)
    report(fleet, lease.lease, 100, 3)
    assert (left(fleet), fleet.pool.output_share, leases.ended["failed"]) == (897, share, 1)


@pytest.mark.parametrize("released", [True, False])
@pytest.mark.parametrize("gone", [True, False])
def test_a_lease_without_a_report_stays_charged_and_lets_go_at_its_end(released: bool, gone: bool) -> None:
    fleet, leases = world(leases={"ttl_s": 10})
    keyed = caller(tokens_per_minute=1000, concurrency=1)
    lease = leases.assign(ASK, keyed, 100.0)
    if released:
        leases.release(lease.lease, False, 101.0)
    leases.expire(109.0)
    assert fleet.state.callers._usage["a"].live == 1
    if gone:
        fleet.state.fleet.remove(fleet.replicas[0])
    leases.expire(109.5 if gone else 110.0)
    assert (fleet.state.callers._usage["a"].live, left(fleet), len(leases)) == (0, 500, 0)


def test_released_leases_that_nobody_reports_are_bounded() -> None:
    fleet, leases = world(leases={"max_leases": 3})
    for _ in range(10):
        leases.release(leases.assign(ASK, caller(concurrency=4), 100.0).lease, False, 100.0)
    assert fleet.state.callers._usage["a"].live == 3


def test_a_lease_is_signed_for_its_replica_and_names_its_request() -> None:
    secrets = new_secrets()
    own = [secrets.credentials(Identity.ROUTER, Program.ROUTER)]
    fleet = CoreFleet(replicas=1)
    leases = IssuedLeases(fleet.state, LeaseSigner(lambda: own[0]), lambda: UNIX_S)
    for asked in ("mine", ""):
        ask = router_pb2.AssignRequest(model="m", prompt_tokens=5, max_tokens=7, request_id=asked)
        lease = leases.assign(ask, Caller(), 100.0)
        assert lease.request_id == asked or (not asked and lease.request_id)
        worker = secrets.credentials(Identity.WORKER, Program.WORKER, "m-0")
        terms = verify(
            lease.lease,
            keys_of(worker),
            replica="m-0",
            incarnation=lease.incarnation,
            request_id=lease.request_id,
            now_s=UNIX_S,
        )
        assert (terms.model, terms.prompt_tokens, terms.max_tokens, terms.until_s) == ("m", 5, 7, 5600)
        leases.release(lease.lease, False, 101.0)
    assert len(leases) == 0
    # After a rotation the new secret signs, at once.
    secrets = secrets.begun().switched()
    own[0] = secrets.credentials(Identity.ROUTER, Program.ROUTER)
    lease = leases.assign(ASK, Caller(), 100.0)
    new = secrets.ended().credentials(Identity.WORKER, Program.WORKER, "m-0")
    assert verify(
        lease.lease,
        keys_of(new),
        replica="m-0",
        incarnation=lease.incarnation,
        request_id=lease.request_id,
        now_s=UNIX_S,
    ).lease_id == lease_id(lease.lease)


def keys_of(credentials: Credentials) -> list[bytes]:
    return [bytes.fromhex(key) for key in credentials.lease_keys]


def test_a_lease_without_a_limit_allows_what_the_context_leaves() -> None:
    secrets = new_secrets()
    fleet = CoreFleet(replicas=1)
    leases = IssuedLeases(fleet.state, LeaseSigner(lambda: secrets.credentials(Identity.ROUTER, Program.ROUTER)))
    lease = leases.assign(router_pb2.AssignRequest(model="m", prompt_tokens=96), Caller(), 100.0)
    assert json.loads(lease.lease.split(".", 2)[2])[4:6] == [96, 4000]


def test_a_request_id_has_a_bound() -> None:
    _fleet, leases = world()
    with pytest.raises(RequestError, match="request_id"):
        leases.assign(router_pb2.AssignRequest(model="m", request_id="x" * 257), Caller(), 100.0)
