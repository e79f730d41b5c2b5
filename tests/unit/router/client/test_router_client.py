"""The Python client: what its callers wait for ends, whatever becomes of it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from megatoken.errors import RequestError, UnavailableError
from megatoken.router.client.client import TokenClient
from megatoken.tls import ClientTls
from megatoken.v1.tokens_pb2 import FINISH_REASON_ERROR, Detail, Finish, Logprobs
from tests.support.fake_router import END, FakeRouter


async def test_closing_ends_what_consumers_wait_for() -> None:
    async with FakeRouter(lambda _: [7, END]) as router:
        router.gate.clear()
        client = TokenClient([router.address])
        await client.connect()
        running = asyncio.create_task(client.generate("m", [1]).tokens())
        await asyncio.sleep(0.05)
        await asyncio.wait_for(client.close(), 5)
        with pytest.raises(UnavailableError, match="the client was closed"):
            await asyncio.wait_for(running, 2)


async def test_closing_ends_what_waits_for_a_router_and_what_comes_later() -> None:
    client = TokenClient(["127.0.0.1:9"])
    connecting = asyncio.create_task(client.connect())
    await asyncio.sleep(0.05)
    waiting = asyncio.create_task(client.generate("m", [1]).tokens())
    await asyncio.sleep(0.05)
    await asyncio.wait_for(client.close(), 5)
    connecting.cancel()
    with pytest.raises(UnavailableError, match="the client was closed"):
        await asyncio.wait_for(waiting, 2)
    with pytest.raises(UnavailableError, match="the client was closed"):
        await asyncio.wait_for(client.generate("m", [1]).tokens(), 2)


async def test_an_unreadable_certificate_is_an_unavailable_router() -> None:
    client = TokenClient(["127.0.0.1:9"], tls=ClientTls(ca_file=Path("/nowhere")), connect_timeout_s=0.3)
    with pytest.raises(UnavailableError, match="no router answers"):
        await client.connect()


async def test_log_probabilities_of_a_prompt_in_pieces_are_joined() -> None:
    def rows(first: int, last: int) -> Detail:
        numbers = range(first, last)
        values = [-float(n) for n in numbers]
        return Detail(prompt_logprobs=Logprobs(width=1, token=numbers, logprob=values, rank=numbers))

    async with (
        FakeRouter(lambda _: [rows(0, 2), rows(2, 5), 7, END]) as router,
        TokenClient([router.address]) as client,
    ):
        deltas = [delta async for delta in client.generate("m", [1])]
    got = [token for delta in deltas if delta.prompt_logprobs is not None for token in delta.prompt_logprobs.token]
    assert got == [0, 1, 2, 3, 4]
    assert [token for delta in deltas for token in delta.tokens] == [7]


async def test_a_request_that_a_draining_router_refuses_is_sent_again_on_a_new_session() -> None:
    refused = Finish(reason=FINISH_REASON_ERROR, code=14, message="the router is draining", draining=True)
    answers = [[refused], [7, END]]

    async with FakeRouter(lambda _: answers.pop(0)) as router, TokenClient([router.address]) as client:
        assert await asyncio.wait_for(client.generate("m", [1]).tokens(), 5) == [7]
        assert [list(request.prompt) for request in router.requests] == [[1], [1]]
        assert len(router.sessions) == 2


async def test_a_request_that_had_tokens_is_not_sent_again_though_its_router_drains() -> None:
    refused = Finish(reason=FINISH_REASON_ERROR, code=14, message="the router is draining", draining=True)
    async with FakeRouter(lambda _: [7, refused]) as router, TokenClient([router.address]) as client:
        with pytest.raises(UnavailableError, match="draining"):
            await asyncio.wait_for(client.generate("m", [1]).tokens(), 5)
        assert len(router.requests) == 1


@pytest.mark.parametrize("routers", [[], [""], ["127.0.0.1:7000", ""]])
def test_an_address_that_is_missing_is_named_at_once(routers: list[str]) -> None:
    with pytest.raises(RequestError, match=r"^routers: .* is not allowed; at least one host:port"):
        TokenClient(routers)
