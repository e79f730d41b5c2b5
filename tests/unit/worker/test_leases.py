"""Requests straight from clients run with a lease of their own, within it and until its end, and are accounted for."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from megatoken.access.credentials import Credentials
from megatoken.access.lease import LeaseTerms, sign
from megatoken.errors import ForbiddenError, OverloadError, RequestError
from megatoken.v1 import frame_columns_pb2 as columns
from megatoken.v1 import tokens_pb2 as pb
from megatoken.worker.engines.engine import Ended
from megatoken.worker.leases import LeaseTable, UncheckedLeases
from megatoken.worker.streams.outlet import FRAME_USAGE, WAITING_USAGE, Outlet
from tests.unit.worker.test_replica import World

KEY = "6b" * 32
NOW_S = 1000.0


class Clock:
    now_s = NOW_S

    def __call__(self) -> float:
        return self.now_s


def book(clock: Clock | None = None, incarnation: int = 7, most: int = 100) -> LeaseTable:
    credentials = Credentials(token="t", accepted={}, lease_keys=(KEY,))
    return LeaseTable("r0", incarnation, lambda: credentials, clock or Clock(), most)


def lease(name: str = "a", incarnation: int = 7, until_s: int = 1010, key: str = KEY) -> str:
    terms = LeaseTerms(name, "r0", incarnation, f"request-{name}", "m", 3, 8, until_s)
    return sign(terms, bytes.fromhex(key))


def ask(text: str, name: str = "a", **sampling: int) -> columns.GenerateRequest:
    prompt = np.array((1, 2, 3), "<u4").tobytes()
    return columns.GenerateRequest(
        prompt=prompt, request_id=f"request-{name}", lease=text, sampling=pb.SamplingParams(**sampling)
    )


@pytest.mark.parametrize(
    ("prompt_tokens", "sampling", "why"),
    [
        (3, {"max_tokens": 8}, None),
        (3, {"max_tokens": 4, "n": 2}, None),
        (4, {"max_tokens": 8}, "prompt: 4 tokens, and the lease allows 3"),
        (3, {"max_tokens": 9}, "sampling.max_tokens: 9 for each of 1, and the lease allows 8"),
        (3, {"max_tokens": 5, "n": 2}, "sampling.max_tokens: 5 for each of 2, and the lease allows 8"),
        (3, {"n": 128}, "sampling.max_tokens: 1 for each of 128"),
    ],
)
def test_a_request_is_no_larger_than_its_lease(prompt_tokens: int, sampling: dict[str, int], why: str | None) -> None:
    request = ask(lease(), **sampling)
    if why is None:
        assert book().check(request, prompt_tokens, 97).lease_id == "a"
        return
    with pytest.raises(ForbiddenError, match=why):
        book().check(request, prompt_tokens, 97)


def test_a_lease_lets_nobody_go_before_others() -> None:
    request = ask(lease())
    request.priority = -1
    with pytest.raises(RequestError, match="priority: -1 is not allowed; 0 or more with a lease"):
        book().check(request, 3, 97)


@pytest.mark.parametrize(("room", "choices", "granted"), [(97, 1, 8), (97, 2, 4), (5, 1, 5)])
def test_a_request_that_names_no_limit_has_its_lease_s(room: int, choices: int, granted: int) -> None:
    request = ask(lease(), n=choices)
    book().check(request, 3, room)
    assert request.sampling.max_tokens == granted


def test_used_leases_are_remembered_until_their_end_and_no_longer() -> None:
    clock = Clock()
    used = book(clock, most=2)
    for name in ("a", "b"):
        used.take(used.check(ask(lease(name), name), 3, 97))
    with pytest.raises(ForbiddenError, match="used already"):
        used.check(ask(lease()), 3, 97)
    with pytest.raises(OverloadError, match="2 leases in use"):
        used.check(ask(lease("c", until_s=2000), "c"), 3, 97)
    clock.now_s = 1010.0
    used.take(used.check(ask(lease("c", until_s=2000), "c"), 3, 97))
    assert len(used) == 1
    with pytest.raises(ForbiddenError, match=r"it ended 0\.0 s ago"):
        used.check(ask(lease()), 3, 97)


async def leased_world(tmp_path: Path, clock: Clock | None = None) -> tuple[World, Outlet, Outlet]:
    world = await World(tmp_path, incarnation=7).start()
    router, client = Outlet(), Outlet(book(clock))
    world.replica.open(router, wants_load=True)
    world.replica.open(client, wants_load=False)
    return world, router, client


def reported(outlet: Outlet) -> list[tuple[str, int, int]]:
    found = []
    while (taken := outlet.take()) is not None:
        frame = columns.Frame.FromString(taken.frame())
        found += [(usage.lease_id, usage.prompt_tokens, usage.generated_tokens) for usage in frame.usage]
    return found


def refusals(outlet: Outlet) -> list[tuple[int, str]]:
    taken = outlet.take()
    parts = taken.parts if taken is not None else []
    finishes = [pb.Finish.FromString(encoded) for part in parts for encoded in part.finishes]
    return [(finish.code, finish.message) for finish in finishes]


async def test_routers_hear_what_a_leased_request_used_and_clients_do_not(tmp_path: Path) -> None:
    world, router, client = await leased_world(tmp_path)
    world.replica.submit(client, 5, ask(lease(), n=2, max_tokens=4))
    one, two = world.engine.submitted[0].slots
    world.engine.step([one, two], [7, 8])
    world.engine.step([one], [9], ended=[Ended(one, pb.FINISH_REASON_LENGTH)])
    assert reported(router) == []
    world.replica.cancel(client, [6])
    assert reported(router) == [("a", 3, 3)]
    assert reported(client) == []


async def test_a_session_of_a_client_runs_nothing_without_a_lease_and_uses_each_once(tmp_path: Path) -> None:
    world, router, client = await leased_world(tmp_path)
    unauthenticated, denied = 16, 7
    for text, code, why in [
        ("", unauthenticated, "needs one"),
        (lease(key="6f" * 32), unauthenticated, "signature is wrong"),
        (lease(incarnation=6), denied, "another incarnation"),
        (lease(until_s=999), denied, "ended 1.0 s ago"),
    ]:
        world.replica.submit(client, 5, ask(text, max_tokens=4))
        ((got, message),) = refusals(client)
        assert (got, why in message) == (code, True), message
    world.replica.submit(client, 5, ask(lease(), max_tokens=4, min_tokens=5))  # wrong otherwise: the lease is not used
    assert "min_tokens" in refusals(client)[0][1]
    world.replica.submit(client, 5, ask(lease(), max_tokens=4))
    world.replica.submit(client, 6, ask(lease(), max_tokens=4))  # while the first runs
    assert "used already" in refusals(client)[0][1]
    world.replica.cancel(client, [5])
    refusals(client)
    world.replica.submit(client, 5, ask(lease(), max_tokens=4))  # and after it
    assert "used already" in refusals(client)[0][1]
    assert len(world.engine.submitted) == 1
    world.replica.submit(router, 1, ask("", max_tokens=4))  # a router's own needs none
    assert len(world.engine.submitted) == 2


async def test_drain_and_fencing_hold_for_leases_too(tmp_path: Path) -> None:
    world, router, client = await leased_world(tmp_path)
    world.replica.submit(client, 5, ask(lease(), max_tokens=4))
    world.replica.drain()
    world.replica.submit(client, 6, ask(lease("b"), "b", max_tokens=4))
    assert "is draining" in refusals(client)[0][1]
    assert list(client.slots) == [5]
    world.replica.end_running()  # the drain's deadline
    assert "stopped" in refusals(client)[0][1]
    assert reported(router) == [("a", 3, 0)]
    world.replica.draining = False
    world.replica.fence("nobody renews it")
    world.replica.submit(client, 6, ask(lease("b"), "b", max_tokens=4))
    assert "is fenced" in refusals(client)[0][1]


async def test_a_stream_ends_with_its_lease(tmp_path: Path) -> None:
    clock = Clock()
    clock.now_s = 1009.95
    world, router, client = await leased_world(tmp_path, clock)
    world.replica.submit(client, 5, ask(lease(), max_tokens=4))
    await asyncio.sleep(0.02)
    assert list(client.slots) == [5]
    await asyncio.sleep(0.1)
    assert refusals(client) == [(4, "lease: it ended while its request ran")]
    assert world.engine.aborted == list(world.engine.submitted[0].slots)
    assert reported(router) == [("a", 3, 0)]


async def test_a_worker_that_lets_everybody_in_reports_by_the_lease_s_name(tmp_path: Path) -> None:
    world = await World(tmp_path).start()
    caller = Outlet(UncheckedLeases())
    world.replica.open(caller, wants_load=True)
    for text in ("", "plain"):
        world.replica.submit(caller, 5, ask(text, max_tokens=4))
        world.replica.cancel(caller, [5])
    assert reported(caller) == [("plain", 3, 0)]


def test_reports_wait_for_a_slow_router_within_a_bound() -> None:
    outlet = Outlet()
    for number in range(WAITING_USAGE + 10):
        outlet.state_usage(pb.LeaseUsage(lease_id=str(number)))
    first = outlet.take()
    assert first is not None
    assert len(first.usage) == FRAME_USAGE
    assert len(reported(outlet)) == WAITING_USAGE - FRAME_USAGE
