"""Keys, limits of a tenant, leases."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from megatoken.errors import AuthError, OverloadError, RequestError, UnavailableError
from megatoken.process.supervise import Faults
from megatoken.router.core import submission
from megatoken.router.core.request import Request
from megatoken.router.core.submission import submit
from megatoken.router.identity.api_keys import ApiKey, KeyRing
from megatoken.router.identity.callers import Caller, CallerRegistry
from megatoken.router.identity.key_limits import Usage
from megatoken.router.measures import refusal_reason
from megatoken.router.shell.leases import IssuedLeases
from megatoken.tokens.frames import pack
from megatoken.v1 import frame_columns_pb2, router_pb2
from tests.support.router_core import CoreFleet

HASH = hashlib.sha256(b"secret-1").hexdigest()


def write_keys(path: Path, *keys: dict[str, object]) -> Path:
    path.write_text(json.dumps({"keys": keys}))
    os.utime(path, ns=(len(keys), hash(str(keys)) % 10**9))
    return path


def bearer(secret: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {secret}"),)


def test_a_key_is_known_by_its_hash_and_a_withdrawn_one_stops_at_once(tmp_path: Path) -> None:
    path = write_keys(tmp_path / "keys", {"name": "a", "sha256": HASH, "models": ["m"]})
    ring = KeyRing(path)
    callers = CallerRegistry(ring)
    caller = callers.identify(bearer("secret-1"))
    assert caller.tenant == "a"
    assert callers.identify((("x-api-key", "secret-1"),)).tenant == "a"
    for metadata in (None, (), bearer("secret-2"), bearer("")):
        with pytest.raises(AuthError) as caught:
            callers.identify(metadata)
        assert "secret" not in str(caught.value)
    callers.admit(caller, "m")
    with pytest.raises(AuthError, match="not allowed 'other'"):
        callers.admit(caller, "other")
    write_keys(path, {"name": "b", "sha256": HASH}, {"name": "c", "sha256": "0" * 64})
    ring.refresh()
    with pytest.raises(AuthError, match="not known any more"):
        callers.admit(caller, "m")
    assert callers.identify(bearer("secret-1")).tenant == "b"


@pytest.mark.parametrize("names", [("authorization", "x-api-key"), ("x-api-key", "authorization")])
def test_two_keys_that_differ_are_no_key(tmp_path: Path, names: tuple[str, str]) -> None:
    callers = CallerRegistry(KeyRing(write_keys(tmp_path / "keys", {"name": "a", "sha256": HASH})))
    shown = {"authorization": "Bearer secret-1", "x-api-key": "made-up"}
    with pytest.raises(AuthError, match="more than one API key") as caught:
        callers.identify([(name, shown[name]) for name in names])
    assert "secret-1" not in str(caught.value)
    assert "made-up" not in str(caught.value)
    twice = (("authorization", "bearer  secret-1"), ("x-api-key", " secret-1 "), ("authorization", "Basic abc"))
    assert callers.identify(twice).tenant == "a"


def test_a_key_file_that_does_not_read_leaves_the_last_keys_in_force(tmp_path: Path) -> None:
    path = write_keys(tmp_path / "keys", {"name": "a", "sha256": HASH})
    ring = KeyRing(path)
    path.write_text("{")
    ring.refresh()
    assert ring.find("secret-1") is not None
    with pytest.raises(ValueError, match=r"keys\.0\.sha256"):
        KeyRing(write_keys(tmp_path / "other", {"name": "a", "sha256": "secret-1"}))


def key(**limits: float) -> ApiKey:
    return ApiKey.model_validate({"name": "a", "sha256": HASH, **limits})


def test_requests_a_minute_refill_evenly() -> None:
    usage = Usage()
    limited = key(requests_per_minute=2)
    usage.enter(limited, 1, 10, 0.0)
    usage.enter(limited, 1, 10, 0.0)
    with pytest.raises(OverloadError) as caught:
        usage.enter(limited, 1, 10, 0.0)
    assert caught.value.retry_after_s == pytest.approx(30.0)
    usage.enter(limited, 1, 10, 30.0)


def test_tokens_a_minute_are_put_right_at_the_end() -> None:
    usage = Usage()
    limited = key(tokens_per_minute=1000)
    usage.enter(limited, 1, 900, 0.0)
    with pytest.raises(OverloadError, match="1000 tokens a minute"):
        usage.enter(limited, 1, 200, 0.0)
    usage.leave(900, 100)
    usage.enter(limited, 1, 200, 0.0)


def test_bytes_a_minute_count_what_has_no_tokens() -> None:
    fleet = CoreFleet()
    limited = key(bytes_per_minute=1000)
    fleet.submit(key=limited, cache_salt="s" * 800)
    with pytest.raises(OverloadError, match="1000 bytes a minute"):
        fleet.submit(key=limited, cache_salt="s" * 800)
    fleet.submit(key=limited)


def test_concurrency_counts_choices_and_ends() -> None:
    usage = Usage()
    limited = key(concurrency=2)
    with pytest.raises(OverloadError, match="at once"):
        usage.enter(limited, 3, 1, 0.0)
    usage.enter(limited, 2, 1, 0.0)
    usage.leave(1, 1)
    usage.enter(limited, 1, 1, 0.0)


def test_a_lease_keeps_its_place_until_it_is_released_or_over() -> None:
    fleet = CoreFleet(replicas=1, max_running=1, admission={"replica_slack": 1.0}, leases={"ttl_s": 10})
    leases = IssuedLeases(fleet.state)
    ask = router_pb2.AssignRequest(model="m", prompt_tokens=5, max_tokens=10)
    lease = leases.assign(ask, Caller(), 100.0)
    assert (lease.replica, lease.ttl_ms, len(leases)) == ("m-0", 10_000, 1)
    assert fleet.replicas[0].outstanding_tokens == 15
    with pytest.raises(OverloadError, match="no replica of 'm' has room"):
        leases.assign(ask, Caller(), 101.0)
    leases.release(lease.lease, False, 102.0)
    leases.release(lease.lease, False, 102.0)
    assert (fleet.replicas[0].outstanding_tokens, leases.ended["released"]) == (0, 1)
    leases.assign(ask, Caller(), 103.0)
    leases.expire(112.0)
    assert len(leases) == 1
    leases.expire(113.1)
    assert (len(leases), leases.ended["expired"]) == (0, 1)
    fleet.check_idle()


def test_leases_follow_drain_and_loss() -> None:
    fleet = CoreFleet(replicas=1)
    leases = IssuedLeases(fleet.state)
    ask = router_pb2.AssignRequest(model="m", prompt_tokens=5, max_tokens=10)
    leases.assign(ask, Caller(), 100.0)
    fleet.replicas[0].draining = True
    fleet.tick()
    with pytest.raises(OverloadError):
        leases.assign(ask, Caller(), 100.0)
    fleet.state.fleet.remove(fleet.replicas[0])
    leases.expire(101.0)
    assert len(leases) == 0
    with pytest.raises(UnavailableError):
        leases.assign(ask, Caller(), 100.0)
    with pytest.raises(RequestError, match="model: 'x'"):
        leases.assign(router_pb2.AssignRequest(model="x"), Caller(), 100.0)


def keyed(**limits: float) -> tuple[CoreFleet, Caller]:
    fleet = CoreFleet()
    return fleet, Caller("a", key(**limits))


def send(fleet: CoreFleet, caller: Caller, own: object = None, **sampling: int) -> list[Request]:
    message = frame_columns_pb2.GenerateRequest(model="m", prompt=pack((1, 2)))
    for name, value in sampling.items():
        setattr(message.sampling, name, value)
    return submit(fleet.state, fleet.sink, fleet.sink.index, 0, message, caller, float("inf"), fleet.now, own)  # type: ignore[arg-type]


def test_a_seed_that_has_no_room_for_every_choice_is_refused_and_holds_no_place() -> None:
    fleet, caller = keyed(concurrency=2)
    for _ in range(3):
        with pytest.raises(RequestError, match="seed: 9223372036854775807 is not allowed; at most 9223372036854775806"):
            send(fleet, caller, n=2, seed=(1 << 63) - 1)
    assert len(send(fleet, caller, n=2, seed=(1 << 63) - 2)) == 2


def test_a_request_that_fails_on_its_way_in_gives_back_what_it_was_charged(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet, caller = keyed(concurrency=1)
    fleet.state.faults = Faults()

    def refuse(_requests: list[Request]) -> None:
        raise KeyError("x")

    for _ in range(2):
        with pytest.raises(UnavailableError, match="internal error"):
            send(fleet, caller, own=refuse)
    with monkeypatch.context() as broken:
        broken.setattr(submission, "_choice_bytes", lambda *_: 1 / 0)
        with pytest.raises(UnavailableError, match="internal error"):
            send(fleet, caller)
    assert fleet.state.faults.counts == {"submission": 3}
    assert len(send(fleet, caller)) == 1


def test_a_key_over_its_limit_is_refused_for_that_and_not_for_a_full_queue() -> None:
    fleet = CoreFleet()
    key = ApiKey(name="one", sha256="0" * 64, concurrency=1)
    fleet.submit(key=key, tenant="one")
    with pytest.raises(OverloadError) as refused:
        fleet.submit(key=key, tenant="one")
    assert refusal_reason(refused.value, draining=False) == "limit"
    assert refusal_reason(OverloadError("full", 1.0), draining=False) == "queue_full"
