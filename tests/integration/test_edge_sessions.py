"""The edge's sessions with a router: one for all, or one a key. Without vLLM."""

from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from megatoken.errors import OverloadError, UnavailableError
from megatoken.reconnect import Pauses
from megatoken.router.edge.config import EdgeConfig
from megatoken.router.edge.metrics import EdgeMetrics
from megatoken.router.edge.router_session import link
from megatoken.router.edge.router_session import sessions as module
from megatoken.router.edge.router_session.link import RouterLink
from megatoken.router.edge.router_session.session import SHUTTING_DOWN
from megatoken.router.edge.router_session.sessions import Sessions
from megatoken.router.identity.api_keys import KeyRing
from megatoken.tokens.frames import pack
from megatoken.v1.frame_columns_pb2 import GenerateRequest
from megatoken.v1.tokens_pb2 import Detail, Finish
from tests.support.fake_router import END, FakeRouter


class Collected:
    """A receiver that can be waited for."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.tokens: list[int] = []
        self.ended: asyncio.Future[Finish] = asyncio.get_running_loop().create_future()

    def feed(self, tokens: list[int], details: list[Detail] | None, finish: Finish | None) -> None:
        self.tokens += tokens
        if finish is not None:
            self.ended.set_result(finish)


async def ask(sessions: Sessions, secret: str, request_id: str) -> list[int]:
    receiver = Collected(request_id)
    with sessions.use(secret) as session:
        await session.wait_connected()
        session.open(receiver, GenerateRequest(model="m", prompt=pack([1])))
    await asyncio.wait_for(receiver.ended, 10)
    return receiver.tokens


def config(router: str, **changed: Any) -> EdgeConfig:
    models = [{"name": "m", "source": "/m"}]
    limits = {"connect_timeout_s": 5.0, "max_requests": 2}
    return EdgeConfig.model_validate({"edge": "e", "router": router, "models": models, "limits": limits, **changed})


def ring(path: Path) -> KeyRing:
    keys = [{"name": name, "sha256": hashlib.sha256(name.encode()).hexdigest()} for name in ("one", "two")]
    path.write_text(json.dumps({"keys": keys}))
    return KeyRing(path)


async def test_without_keys_there_is_one_session() -> None:
    async with FakeRouter(lambda _: [7, END]) as router:
        sessions = Sessions(config(router.address), EdgeMetrics(), None)
        sessions.start()
        try:
            assert await ask(sessions, "anything", "a") == [7]
            assert await ask(sessions, "", "b") == [7]
            assert sessions.connected
            assert router.keys == [None]
        finally:
            await sessions.close()


async def test_each_key_goes_on_to_the_router(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "UPKEEP_S", 0.02)
    monkeypatch.setattr(module, "IDLE_S", 0.0)
    async with FakeRouter(lambda _: [7, END]) as router:
        sessions = Sessions(config(router.address), EdgeMetrics(), ring(tmp_path / "keys.json"))
        sessions.start()
        try:
            assert await ask(sessions, "one", "a") == [7]
            assert await ask(sessions, "two", "b") == [7]
            assert sorted(str(key) for key in router.keys) == ["Bearer one", "Bearer two"]
            await asyncio.sleep(0.2)  # idle for longer than they are kept
            assert await ask(sessions, "one", "c") == [7]
            assert router.keys[2:] == ["Bearer one"]
            assert sessions.connected
        finally:
            await sessions.close()


async def test_an_edge_with_its_own_key_has_one_session(tmp_path: Path) -> None:
    async with FakeRouter(lambda _: [7, END]) as router:
        made = config(router.address, router_key="edge-key")
        sessions = Sessions(made, EdgeMetrics(), ring(tmp_path / "keys.json"))
        sessions.start()
        try:
            await ask(sessions, "one", "a")
            await ask(sessions, "two", "b")
            assert router.keys == ["Bearer edge-key"]
        finally:
            await sessions.close()


async def test_the_bound_on_running_requests() -> None:
    async with FakeRouter(lambda _: [7, END]) as router:
        router.gate.clear()
        sessions = Sessions(config(router.address), EdgeMetrics(), None)
        sessions.start()
        try:
            running = [asyncio.create_task(ask(sessions, "", name)) for name in ("a", "b")]
            async with asyncio.timeout(10):
                while len(router.requests) < 2:  # noqa: ASYNC110 (the router is another party)
                    await asyncio.sleep(0.01)
            with pytest.raises(OverloadError, match="2 requests running"):
                await ask(sessions, "", "c")
            router.gate.set()
            await asyncio.gather(*running)
            assert sessions.running == 0
            assert await ask(sessions, "", "d") == [7]
        finally:
            await sessions.close()


async def test_no_router_is_said_in_time() -> None:
    limits = {"connect_timeout_s": 0.2}
    sessions = Sessions(config("127.0.0.1:9", limits=limits), EdgeMetrics(), None)
    sessions.start()
    try:
        with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:9"):
            await ask(sessions, "", "a")
        assert not sessions.connected
    finally:
        await sessions.close()


async def test_a_router_that_refuses_sessions_while_it_shuts_down_costs_a_request_only_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(link, "Pauses", lambda: Pauses(0.01, 0.01))
    async with FakeRouter(lambda _: [7, END]) as router:
        router.gate.clear()
        sessions = Sessions(config(router.address), EdgeMetrics(), None)
        sessions.start()
        try:
            asking = asyncio.create_task(ask(sessions, "", "a"))
            async with asyncio.timeout(10):
                while not router.requests:  # noqa: ASYNC110 (the router is another party)
                    await asyncio.sleep(0.01)
            router.refusals = 20
            await router.break_sessions()
            async with asyncio.timeout(10):
                while router.refusals:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            router.gate.set()
            assert await asking == [7]
        finally:
            await sessions.close()


async def test_a_session_is_kept_while_somebody_is_about_to_use_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "UPKEEP_S", 0.005)
    monkeypatch.setattr(module, "IDLE_S", 0.0)
    async with FakeRouter(lambda _: [7, END]) as router:
        sessions = Sessions(config(router.address), EdgeMetrics(), ring(tmp_path / "keys.json"))
        sessions.start()
        try:
            receiver = Collected("a")
            with sessions.use("one") as session:
                await session.wait_connected()
                await asyncio.sleep(0.1)  # many upkeeps
                session.open(receiver, GenerateRequest(model="m", prompt=pack([1])))
            await asyncio.wait_for(receiver.ended, 5)
            assert receiver.tokens == [7]
        finally:
            await sessions.close()


async def test_requests_of_a_closed_session_are_told(tmp_path: Path) -> None:
    async with FakeRouter(lambda _: [7, END]) as router:
        router.gate.clear()
        sessions = Sessions(config(router.address), EdgeMetrics(), ring(tmp_path / "keys.json"))
        sessions.start()
        receiver = Collected("a")
        with sessions.use("one") as session:
            await session.wait_connected()
            session.open(receiver, GenerateRequest(model="m", prompt=pack([1])))
        await asyncio.wait_for(sessions.close(), 10)
        finish = await asyncio.wait_for(receiver.ended, 5)
        assert (finish.code, finish.message) == (14, SHUTTING_DOWN)


async def test_a_link_closes_although_one_cancel_is_lost() -> None:
    async with FakeRouter(lambda _: [7, END]) as router:
        link = RouterLink(router.address, lambda _: None, lambda *_: None)
        once = link._one_session
        began = asyncio.Event()

        async def deaf() -> None:
            began.set()
            try:
                await asyncio.sleep(5)
            except asyncio.CancelledError:
                await once()

        link._one_session = deaf  # type: ignore[method-assign]
        link.start()
        await began.wait()
        closing = asyncio.create_task(link.close())
        done, _ = await asyncio.wait((closing,), timeout=5)
        assert closing in done
