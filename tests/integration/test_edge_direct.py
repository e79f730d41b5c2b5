"""Directly written streams against vLLM's own: the same tokens give the same bytes.

The edge runs inside this process, so that a test can see which way its chunks took. "fast" and "plain" are the same
model, with and without direct writes.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import pytest_asyncio
import uvicorn

pytest.importorskip("vllm", reason="vLLM is not installed")

from megatoken.router.edge.assemble import assemble
from megatoken.router.edge.config import EdgeConfig
from megatoken.router.edge.router_session.direct import DirectWriter
from megatoken.v1.tokens_pb2 import FINISH_REASON_ERROR, FINISH_REASON_LENGTH, FINISH_REASON_STOP, Finish
from tests.support.fake_router import FakeRouter, Step

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.vllm]

LENGTH = Finish(reason=FINISH_REASON_LENGTH)
STOP = Finish(reason=FINISH_REASON_STOP)
PARIS = [504, 3575, 282, 4649, 314, 7042, 30]
MESSAGES = [{"role": "user", "content": "Hi"}]


@dataclass
class Stage:
    router: FakeRouter
    host: str
    port: int


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def stage() -> AsyncIterator[Stage]:
    model = {"source": "builtin:smollm2-135m-instruct", "dtype": "bfloat16"}
    async with FakeRouter(lambda _: [STOP]) as router:
        config = EdgeConfig.model_validate(
            {
                "edge": "e",
                "router": router.address,
                "models": [{"name": "fast", **model}, {"name": "plain", "fast_stream": False, **model}],
            }
        )
        edge = await assemble(config)
        listener = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(edge.app, http="httptools", lifespan="off", log_level="warning"))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield Stage(router, *listener.getsockname()[:2])
        finally:
            server.should_exit = True
            await serving
            await edge.close()


async def stream(stage: Stage, path: str, model: str, **body: Any) -> bytes:
    """The body of a stream whose router sends its next step when the client has the chunk of the last one."""
    stage.router.permits = asyncio.Semaphore(1)
    received, released = b"", 0
    headers = {"x-request-id": "same"}
    async with (
        httpx.AsyncClient(timeout=30) as client,
        client.stream(
            "POST",
            f"http://{stage.host}:{stage.port}{path}",
            json={"model": model, "stream": True, **body},
            headers=headers,
        ) as response,
    ):
        assert response.status_code == 200, await response.aread()
        async for part in response.aiter_raw():
            received += part
            # The role's chunk and the first text come of one step.
            texts = received.count(b"data: ") - received.count(b'"role":')
            for _ in range(texts - released):
                stage.router.permits.release()
            released = texts
    return received


def comparable(body: bytes) -> bytes:
    """Without what differs between any two runs: the second of creation, and the model's two names here."""
    return re.sub(rb'"created":\d+', b'"created":0', body).replace(b'"model":"plain"', b'"model":"fast"')


@pytest.fixture
def direct_chunks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that were written directly."""
    texts: list[str] = []
    original = DirectWriter.write

    def write(self: DirectWriter, text: str) -> None:
        texts.append(text)
        original(self, text)

    monkeypatch.setattr(DirectWriter, "write", write)
    return texts


async def both(stage: Stage, path: str, script: Sequence[Step], **body: Any) -> tuple[bytes, bytes]:
    stage.router.script = lambda _: script
    fast = await stream(stage, path, "fast", **body)
    plain = await stream(stage, path, "plain", **body)
    return comparable(fast), comparable(plain)


CASES: list[tuple[str, list[Step], dict[str, Any]]] = [
    ("eos", [*PARIS, [2], STOP], {}),
    ("length", [*PARIS, LENGTH], {}),
    ("several tokens a step", [[504, 3575], [282, 4649, 314], [7042], [30], LENGTH], {}),
    ("usage", [*PARIS, LENGTH], {"stream_options": {"include_usage": True}}),
    ("letters that take several tokens", [*range(180, 260), 30, 29, 28, LENGTH], {}),
    ("stop string", [*PARIS, *PARIS, LENGTH], {"stop": [" of France"]}),
    ("stop string kept", [*PARIS, *PARIS, LENGTH], {"stop": [" of Fr"], "include_stop_str_in_output": True}),
    ("stop string never met", [*PARIS, LENGTH], {"stop": ["nowhere", "is Paris?"]}),
    ("stop token", [*PARIS, [4649], Finish(reason=FINISH_REASON_STOP, stop_token=4649)], {"stop_token_ids": [4649]}),
    ("special tokens shown", [*PARIS, 1, 2, 0, 30, LENGTH], {"skip_special_tokens": False, "ignore_eos": True}),
    ("error in the middle", [*PARIS[:4], Finish(reason=FINISH_REASON_ERROR, code=14, message="gone")], {}),
]


@pytest.mark.parametrize(
    ("path", "asked"), [("/v1/chat/completions", {"messages": MESSAGES}), ("/v1/completions", {"prompt": "Hi"})]
)
@pytest.mark.parametrize(("name", "script", "body"), CASES, ids=[case[0] for case in CASES])
async def test_the_same_bytes(
    stage: Stage, direct_chunks: list[str], path: str, asked: dict[str, Any], name: str, script: list[Step], body: Any
) -> None:
    fast, plain = await both(stage, path, script, **asked, **body)
    assert fast == plain
    assert direct_chunks, "no chunk was written directly"
    assert fast.endswith(b"data: [DONE]\n\n")


LEFT_ALONE: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": MESSAGES, "n": 2}),
    ("/v1/chat/completions", {"messages": MESSAGES, "return_token_ids": True}),
    (
        "/v1/chat/completions",
        {"messages": MESSAGES, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    ),
    ("/v1/completions", {"prompt": ["Hi", "Ho"]}),
    ("/v1/completions", {"prompt": "Hi", "echo": True}),
]


@pytest.mark.parametrize(("path", "body"), LEFT_ALONE)
async def test_what_carries_more_than_text_is_left_to_vllm(
    stage: Stage, direct_chunks: list[str], path: str, body: dict[str, Any]
) -> None:
    stage.router.script = lambda _: [*PARIS, LENGTH]
    stage.router.permits = None
    async with httpx.AsyncClient(timeout=30) as client:
        url = f"http://{stage.host}:{stage.port}{path}"
        response = await client.post(url, json={"model": "fast", "stream": True, **body})
    assert response.status_code == 200
    assert response.text.endswith("data: [DONE]\n\n")
    assert direct_chunks == []


async def test_a_slow_client_gets_everything_and_nothing_piles_up(stage: Stage, direct_chunks: list[str]) -> None:
    size = 8000
    stage.router.script = lambda _: [*([[282] * 4] * (size // 4)), LENGTH]
    stage.router.permits = None
    body = json.dumps(
        {"model": "fast", "stream": True, "prompt": "Hi", "max_tokens": size, "stream_options": {"include_usage": True}}
    ).encode()
    plug = socket.socket()
    plug.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    plug.setblocking(False)
    await asyncio.get_running_loop().sock_connect(plug, (stage.host, stage.port))
    reader, writer = await asyncio.open_connection(sock=plug, limit=4096)
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    writer.write(head % len(body) + body)
    received = await reader.read(1024)
    async with asyncio.timeout(20):  # until the router has sent all, and this client has read next to nothing
        while not stage.router.requests or stage.router.running:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    while not received.endswith(b"0\r\n\r\n"):
        part = await asyncio.wait_for(reader.read(65536), 20)
        assert part, "the connection ended early"
        received += part
    writer.close()
    text = b"".join(line for line in received.split(b"\r\n") if line.startswith(b"data:")).decode()
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    words = "".join(event["choices"][0]["text"] for event in events if event["choices"])
    assert words == " of" * size
    assert events[-1]["usage"]["completion_tokens"] == size
    assert 0 < len(direct_chunks) < size // 4


async def test_a_client_that_leaves_a_direct_stream_cancels_it(stage: Stage, direct_chunks: list[str]) -> None:
    stage.router.script = lambda _: [282] * 100_000
    stage.router.permits = None
    stage.router.step_s = 0.001
    stage.router.cancelled.clear()
    try:
        async with httpx.AsyncClient(timeout=30) as client:
            url = f"http://{stage.host}:{stage.port}/v1/completions"
            async with client.stream(
                "POST", url, json={"model": "fast", "prompt": "Hi", "stream": True, "max_tokens": 8000}
            ) as response:
                async for _ in response.aiter_raw():
                    if len(direct_chunks) > 3:
                        break
        async with asyncio.timeout(10):
            while not stage.router.cancelled:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    finally:
        stage.router.step_s = 0.0
