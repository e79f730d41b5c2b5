"""What keeps a connection open survives whatever goes wrong on the way, and goes on."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest
from grpc import aio

from megatoken.reconnect import Pauses
from megatoken.router.edge.router_session import link as edge_module
from megatoken.router.fleet.circuit import CircuitState
from megatoken.router.secure import channel_to
from megatoken.router.shell import watch as watch_module
from megatoken.router.shell import worker_link as link_module
from megatoken.router.shell.inbox import Inbox
from megatoken.router.shell.membership import apply_snapshot
from megatoken.router.shell.watch import watch_membership
from megatoken.router.shell.worker_link import WorkerLink
from megatoken.tls import ClientTls
from megatoken.v1 import membership_pb2
from tests.support.fake_router import FakeRouter
from tests.support.fake_worker import FakeWorker
from tests.support.router_core import CoreFleet

TLS = ClientTls(ca_file=Path("/nowhere/ca.pem"))


async def soon(what: Any, timeout_s: float = 5.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not what():  # noqa: ASYNC110 (the other side is a real server)
            await asyncio.sleep(0.01)


class Channels:
    """Opens channels; the first ones fail as an unreadable certificate does."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.opened = 0

    def __call__(self, address: str) -> aio.Channel:
        self.opened += 1
        return channel_to(address, TLS if self.opened <= self.failures else None)


async def test_a_link_to_a_worker_goes_on_after_an_unreadable_certificate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "Pauses", lambda: Pauses(0.01, 0.01))
    fleet = CoreFleet(replicas=1)
    (replica,) = fleet.replicas
    fleet.lose(replica)
    channels = Channels(failures=3)
    link = WorkerLink(fleet.state, Inbox(fleet.state), replica, channels)
    async with FakeWorker(replica.name, replica.member.incarnation) as worker:
        replica.member = type(replica.member)(**{**fields(replica.member), "address": worker.address})
        link.start()
        await soon(lambda: replica.connected)
        assert fleet.state.ledger.connection_faults == 3
        await link.close()
    assert not replica.connected


class ReadyChannel:
    """Becomes ready when told, and answers nothing."""

    def __init__(self) -> None:
        self.ready = asyncio.Event()

    async def channel_ready(self) -> None:
        await self.ready.wait()

    def unary_unary(self, *_: Any, **__: Any) -> Any:
        async def never(*_: Any, **__: Any) -> None:
            await asyncio.Event().wait()

        return never

    async def close(self, _grace: float | None) -> None:
        pass


@pytest.mark.parametrize("turns", range(5))
async def test_a_link_that_is_closed_as_its_channel_becomes_ready_ends(turns: int) -> None:
    fleet = CoreFleet(replicas=1)
    (replica,) = fleet.replicas
    fleet.lose(replica)
    channel: Any = ReadyChannel()
    link = WorkerLink(fleet.state, Inbox(fleet.state), replica, lambda _address: channel)
    link.start()
    await asyncio.sleep(0.01)
    channel.ready.set()
    for _ in range(turns):
        await asyncio.sleep(0)
    closing = asyncio.create_task(link.close())
    _, late = await asyncio.wait((closing,), timeout=2)
    for task in late:
        task.cancel()
    assert not late


@pytest.mark.parametrize(("name", "incarnation"), [("m-1", 1), ("m-0", 2)])
async def test_a_link_uses_no_other_replica_at_its_address_and_tries_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str, incarnation: int
) -> None:
    monkeypatch.setattr(link_module, "Pauses", lambda: Pauses(0.01, 0.01))
    caplog.set_level(logging.WARNING, logger=link_module.__name__)  # whatever a library has switched off
    fleet = CoreFleet(replicas=1)
    (replica,) = fleet.replicas
    fleet.lose(replica)
    link = WorkerLink(fleet.state, Inbox(fleet.state), replica, Channels(failures=0))
    async with FakeWorker(name, incarnation) as worker:
        replica.member = type(replica.member)(**{**fields(replica.member), "address": worker.address})
        link.start()
        await soon(lambda: worker.described >= 3)
        assert (replica.connected, worker.sessions) == (False, 0)
        told = [record for record in caplog.records if "it gets no request" in record.getMessage()]
        assert len(told) == 1, "it is told once, not at every attempt"
        worker.replica, worker.incarnation = replica.name, replica.member.incarnation
        await soon(lambda: replica.connected and worker.sessions)
        await link.close()


async def test_an_open_circuit_is_probed_at_the_worker_and_closes_when_it_is_well() -> None:
    fleet = CoreFleet(replicas=1, breaker={"failures": 1, "open_s": 1.0})
    (replica,) = fleet.replicas
    fleet.lose(replica)
    link = WorkerLink(fleet.state, Inbox(fleet.state), replica, Channels(failures=0))
    async with FakeWorker(replica.name, replica.member.incarnation) as worker:
        replica.member = type(replica.member)(**{**fields(replica.member), "address": worker.address})
        link.start()
        await soon(lambda: replica.connected)
        worker.well = False
        replica.circuit.failed(0.0)
        fleet.tick(2)
        await soon(lambda: worker.probes == 1 and replica.circuit.state is CircuitState.OPEN)
        worker.well = True
        replica.circuit.until_s = fleet.now
        fleet.tick(1)
        await soon(lambda: replica.circuit.closed)
        assert worker.probes == 2
        await link.close()


def fields(member: Any) -> dict[str, Any]:
    return {name: getattr(member, name) for name in member.__dataclass_fields__}


async def test_a_watch_goes_on_after_an_unreadable_certificate_and_a_failed_snapshot(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watch_module, "FIRST_PAUSE_S", 0.01)
    channels = Channels(failures=2)
    states: list[bool] = []
    watching = asyncio.create_task(watch_membership(["127.0.0.1:9"], "r", channels, lambda _: None, states.append))
    await soon(lambda: channels.opened >= 4)
    assert not watching.done()
    assert True not in states
    watching.cancel()


async def test_an_edge_link_goes_on_after_an_unreadable_certificate(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(edge_module, "Pauses", lambda: Pauses(0.01, 0.01))
    opened = 0
    session_of = edge_module.ColumnSession

    def session(address: str, metadata: Any, tls: Any, *rest: Any) -> Any:
        nonlocal opened
        opened += 1
        return session_of(address, metadata, TLS if opened <= 2 else None, *rest)

    monkeypatch.setattr(edge_module, "ColumnSession", session)
    async with FakeRouter(lambda _: []) as router:
        link = edge_module.RouterLink(router.address, lambda _: None, lambda *_: None)
        link.start()
        assert await link.wait_connected(5.0)
        assert link.faults == 2
        await link.close()


async def test_a_session_that_came_and_went_before_its_turn_is_not_what_a_request_waited_for() -> None:
    link = edge_module.RouterLink("127.0.0.1:9", lambda _: None, lambda *_: None)
    waiting = asyncio.create_task(link.wait_connected(0.1))
    await asyncio.sleep(0)
    link._connected.set()
    link._connected.clear()
    assert not await waiting


async def test_an_edge_link_whose_receiver_fails_tells_the_others_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge_module, "Pauses", lambda: Pauses(0.01, 0.01))
    lost: list[str] = []

    def fail(_: object) -> None:
        raise KeyError("a defect")

    async with FakeRouter(lambda _: [7]) as router:
        link = edge_module.RouterLink(router.address, fail, lambda problem, _streams: lost.append(problem))
        link.start()
        assert await link.wait_connected(5.0)
        link.submit(b"")
        await soon(lambda: lost)
        assert await link.wait_connected(5.0)
        await link.close()
    assert lost[0] == f"the edge failed on what router {router.address} sent"


def test_a_policy_that_is_not_known_leaves_the_one_in_force() -> None:
    fleet = CoreFleet()
    before = fleet.pool.policy

    def snapshot(version: int, **policies: str) -> membership_pb2.Snapshot:
        models = [membership_pb2.ModelMember(model=name, policy=policy) for name, policy in policies.items()]
        return membership_pb2.Snapshot(epoch=1, version=version, models=models)

    change = apply_snapshot(fleet.state.fleet, snapshot(1, m="clever", new="clever"), fleet.state.policy_of, 0.0)
    assert change is not None
    assert [problem.split(":")[0] for problem in change.problems] == ["model m", "model new"]
    assert fleet.pool.policy is before
    assert fleet.state.fleet.pools["new"].policy.name == "least_tokens"
    apply_snapshot(fleet.state.fleet, snapshot(2, m="round_robin"), fleet.state.policy_of, 0.0)
    assert fleet.pool.policy.name == "round_robin"
