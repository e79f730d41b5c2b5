"""Writes the chunks of a stream from its second token on, without vLLM's per-chunk layers. Same bytes.

vLLM's generator makes the first chunk of text; what stands before and after the text in it is the same in every chunk
that follows until the last. `learn` takes the two pieces from the real chunk, so they are vLLM's own bytes, and refuses
any chunk of another shape. The last chunk, usage and [DONE] come from vLLM's generator again. Pure but for the write.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from json.encoder import encode_basestring  # type: ignore[attr-defined]  # C, and what pydantic's JSON writes
from typing import Any, Final

BEGIN: Final = 'data: {"id":'
# What stands right before the text, and everything behind it, in a chunk that is neither first nor last.
SHAPES: Final = (
    ('"delta":{"content":', '},"logprobs":null,"finish_reason":null,"token_ids":null}]}\n\n'),
    (
        '"choices":[{"index":0,"text":',
        ',"logprobs":null,"finish_reason":null,"stop_reason":null,"prompt_token_ids":null,"token_ids":null}]}\n\n',
    ),
)


@dataclass(frozen=True, slots=True)
class Template:
    """A chunk without its text."""

    before: bytes
    after: bytes

    def chunk(self, text: str) -> bytes:
        """The chunk that carries `text`."""
        return b"%b%b%b" % (self.before, encode_basestring(text).encode(), self.after)


def learn(chunk: str) -> Template | None:
    """The template of a chunk that vLLM made; None for the first, the last, and any that carries more than text."""
    if not chunk.startswith(BEGIN):
        return None
    for mark, after in SHAPES:
        at = chunk.find(mark)
        if at >= 0 and chunk.endswith(after):
            before, text = chunk[: at + len(mark)], chunk[at + len(mark) : -len(after)]
            if is_json_string(text):
                return Template(before.encode(), after.encode())
    return None


def is_json_string(text: str) -> bool:
    """Whether the text is exactly one JSON string."""
    try:
        return isinstance(json.loads(text), str)
    except ValueError:
        return False


class DirectWriter:
    """Sends chunks of one exchange straight to the HTTP protocol, as long as its client keeps up."""

    __slots__ = ("_flow", "_send", "_template", "chunks")

    def __init__(self, template: Template, send: Any, flow: Any) -> None:
        self._template = template
        self._send = send
        self._flow = flow
        self.chunks = 0

    @property
    def keeps_up(self) -> bool:
        """Whether a write goes through at once. If not, vLLM's generator takes over and waits."""
        return not self._flow.write_paused

    def write(self, text: str) -> None:
        """Writes one chunk. Only while `keeps_up`: the server's send then never suspends."""
        self.chunks += 1
        message = {"type": "http.response.body", "body": self._template.chunk(text), "more_body": True}
        step = self._send(message)
        try:
            step.send(None)
        except StopIteration:
            return
        step.close()
        raise RuntimeError("the HTTP server suspended a write that it had room for")
