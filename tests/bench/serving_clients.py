"""The loads of `make bench`: the Session client to a router, and a plain HTTP client to an edge."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

from megatoken.router.client.client import TokenClient

Prompts = list[list[int]]


async def limited(work: list[Callable[[], Awaitable[int]]], at_once: int) -> dict[str, Any]:
    """Runs all work, so many at a time; each piece returns its number of tokens."""
    places = asyncio.Semaphore(at_once)

    async def one(piece: Callable[[], Awaitable[int]]) -> int:
        async with places:
            return await piece()

    began = time.perf_counter()
    tokens = await asyncio.gather(*(one(piece) for piece in work))
    return {"seconds": time.perf_counter() - began, "tokens": sum(tokens)}


async def session_load(
    client: TokenClient, model: str, prompts: Prompts, max_tokens: int, at_once: int
) -> dict[str, Any]:
    """Every prompt through one Session to the router."""

    def piece(prompt: list[int]) -> Callable[[], Awaitable[int]]:
        async def run() -> int:
            stream = client.generate(model, prompt, max_tokens=max_tokens, ignore_eos=True, temperature=0.0)
            return len(await stream.tokens())

        return run

    return await limited([piece(prompt) for prompt in prompts], at_once)


async def session_first_token(client: TokenClient, model: str, prompt: list[int]) -> float:
    """Seconds from the call to the first token."""
    began = time.perf_counter()
    async for _ in client.generate(model, prompt, max_tokens=1, ignore_eos=True, temperature=0.0):
        return time.perf_counter() - began
    raise RuntimeError("the stream ended without a token")


async def edge_load(
    address: str, model: str, prompts: Prompts, max_tokens: int, at_once: int, stream: bool
) -> dict[str, Any]:
    """Every prompt through the edge's /v1/completions, a connection each as many clients are."""

    def piece(prompt: list[int]) -> Callable[[], Awaitable[int]]:
        async def run() -> int:
            body: dict[str, Any] = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "stream": stream}
            body |= {"ignore_eos": True, "temperature": 0}
            if stream:
                body["stream_options"] = {"include_usage": True}
            return completion_tokens(await post(address, "/v1/completions", body))

        return run

    return await limited([piece(prompt) for prompt in prompts], at_once)


async def edge_first_token(address: str, model: str, prompt: list[int]) -> float:
    """Seconds from the connection's opening to the first byte of the stream."""
    body = {"model": model, "prompt": prompt, "max_tokens": 1, "stream": True, "ignore_eos": True, "temperature": 0}
    began = time.perf_counter()
    reader, writer = await send(address, "/v1/completions", body)
    await reader.readuntil(b"data: ")
    seconds = time.perf_counter() - began
    await reader.read()
    writer.close()
    return seconds


async def edge_chat_first_token(address: str, model: str, messages: list[dict[str, str]]) -> tuple[float, int]:
    """Seconds from the connection's opening to the first byte of the stream, and the cached tokens of its usage."""
    options = {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True, "temperature": 0}
    began = time.perf_counter()
    reader, writer = await send(
        address, "/v1/chat/completions", {"model": model, "messages": messages, "max_tokens": 1, **options}
    )
    await reader.readuntil(b"data: ")
    seconds = time.perf_counter() - began
    _, _, cached = (await reader.read()).rpartition(b'"cached_tokens":')
    writer.close()
    return seconds, int(cached.split(b"}")[0].split(b",")[0] or 0)


async def send(address: str, path: str, body: dict[str, Any]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Opens a connection and sends one request on it."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=1 << 20)
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\ncontent-type: application/json\r\n"
    writer.write(head.encode() + b"content-length: %d\r\n\r\n" % len(content) + content)
    return reader, writer


async def post(address: str, path: str, body: dict[str, Any]) -> bytes:
    """The whole response. Raises RuntimeError when it is not a success."""
    reader, writer = await send(address, path, body)
    answer = await reader.read()
    writer.close()
    if not answer.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(f"the edge answered {answer[:400]!r}")
    return answer


def completion_tokens(answer: bytes) -> int:
    """What the answer's usage says."""
    _, _, rest = answer.rpartition(b'"completion_tokens":')
    return int(rest.split(b",")[0].split(b"}")[0])
