"""The template of a chunk, and the text that is put into it."""

from __future__ import annotations

import json
from typing import Any

import pydantic_core
import pytest

from megatoken.router.edge.http.exchange import Exchange
from megatoken.router.edge.http.refusals import GuardedSend
from megatoken.router.edge.router_session.direct import DirectWriter, Template, learn

CHAT = (
    'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,'
    '"delta":{"content":"Hi"},"logprobs":null,"finish_reason":null,"token_ids":null}]}\n\n'
)
TEXT = (
    'data: {"id":"cmpl-1","object":"text_completion","created":1,"model":"m","choices":[{"index":0,"text":"Hi",'
    '"logprobs":null,"finish_reason":null,"stop_reason":null,"prompt_token_ids":null,"token_ids":null}]}\n\n'
)


@pytest.mark.parametrize("chunk", [CHAT, TEXT])
@pytest.mark.parametrize("text", ["Hi", "", "a\nb", '"quoted" \\ slash', "é漢😀", "\u2028\x7f\x00"])
def test_a_template_puts_text_where_it_was(chunk: str, text: str) -> None:
    template = learn(chunk)
    assert template is not None
    made = template.chunk(text).decode()
    assert made == chunk.replace('"Hi"', json.dumps(text, ensure_ascii=False))


@pytest.mark.parametrize(
    "chunk",
    [
        CHAT.replace('"content":"Hi"', '"role":"assistant","content":""'),
        CHAT.replace('"finish_reason":null', '"finish_reason":"stop"'),
        CHAT.replace('"logprobs":null', '"logprobs":{"content":[]}'),
        CHAT.replace('"token_ids":null', '"token_ids":[1]'),
        CHAT.replace("]}\n\n", '],"usage":{"prompt_tokens":1}}\n\n'),
        CHAT.replace('"Hi"', '"Hi","tool_calls":[]'),
        CHAT.replace('"Hi"', "null"),
        TEXT.replace('"prompt_token_ids":null', '"prompt_token_ids":[1]'),
        "data: [DONE]\n\n",
        'data: {"error":{"message":"no"}}\n\n',
        ": keep-alive\n\n",
        "",
    ],
)
def test_any_other_chunk_has_no_template(chunk: str) -> None:
    assert learn(chunk) is None


def test_text_is_escaped_as_pydantic_escapes_it() -> None:
    template = Template(b"", b"")
    points = (chr(point) for point in range(0x11000) if not 0xD800 <= point < 0xE000)
    text = "".join(points) + "😀"
    assert template.chunk(text) == pydantic_core.to_json(text)


class Flow:
    write_paused = False


class Protocol:
    """As much of an HTTP server's request as a writer sees."""

    def __init__(self) -> None:
        self.flow = Flow()
        self.sent: list[Any] = []

    async def send(self, message: Any) -> None:
        self.sent.append(message)


def test_a_writer_sends_body_messages_and_sees_a_slow_client() -> None:
    server = Protocol()
    writer = Exchange(GuardedSend(server.send)).writer(Template(b"<", b">"))
    assert writer is not None
    assert writer.keeps_up
    writer.write("x")
    assert server.sent == [{"type": "http.response.body", "body": b'<"x">', "more_body": True}]
    server.flow.write_paused = True
    assert not writer.keeps_up


def test_a_server_that_does_not_tell_gets_no_writer() -> None:
    async def send(message: Any) -> None: ...

    assert Exchange(GuardedSend(send)).writer(Template(b"", b"")) is None


def test_a_write_that_suspends_is_a_broken_promise() -> None:
    async def send(message: Any) -> None:
        import asyncio

        await asyncio.sleep(0)

    with pytest.raises(RuntimeError, match="suspended a write"):
        DirectWriter(Template(b"", b""), send, Flow()).write("x")
