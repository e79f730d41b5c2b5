"""Whatever comes in from either side, the edge answers or says what is wrong, and keeps its books."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from megatoken.router.edge.http.dispatch import Dispatch
from megatoken.router.edge.http.outcomes import refusal, stop_reason
from megatoken.router.edge.http.refusals import GuardedSend
from megatoken.router.edge.router_session.direct import learn
from megatoken.router.edge.router_session.session import Session
from megatoken.router.identity.callers import CallerRegistry
from megatoken.tokens.frames import MalformedFrame, pack
from megatoken.v1.frame_columns_pb2 import Frame, GenerateRequest
from megatoken.v1.tokens_pb2 import Detail, Finish, Logprobs, SamplingParams

STREAMS = 4
EVERY = range(1 << 32)
small = st.integers(0, STREAMS + 1)
columns = st.one_of(st.binary(max_size=24), st.lists(small, max_size=6).map(pack))
finishes = st.builds(
    Finish,
    stream=small,
    reason=st.integers(0, 6),
    code=st.integers(0, 20),
    message=st.text(max_size=8),
    draining=st.booleans(),
)
details = st.builds(
    Detail,
    stream=small,
    logprobs=st.builds(Logprobs, width=st.integers(0, 3), token=st.lists(small, max_size=4)),
)
frames = st.builds(
    Frame,
    stream=columns,
    count=columns,
    token=columns,
    detail=st.lists(details, max_size=2),
    finish=st.lists(finishes, max_size=3),
)


class Receiver:
    """Fails the test when it is fed after its end."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.ended = False

    def feed(self, tokens: list[int], details: list[Detail] | None, finish: Finish | None) -> None:
        assert not self.ended, "fed after its finish"
        self.ended = finish is not None
        if finish is not None:
            refusal(finish)
            stop_reason(finish)


class Link:
    problem, connected = "", True

    def __init__(self) -> None:
        self.sent = 0

    async def wait_connected(self, timeout_s: float) -> bool:
        return True

    def submit(self, request: bytes) -> int:
        self.sent += 1
        return self.sent - 1

    def cancel(self, stream: int) -> None: ...

    def renew(self) -> None: ...


class Balance:
    """Counts what started and what ended."""

    def __init__(self) -> None:
        self.running = 0

    def started(self, model: str) -> None:
        self.running += 1

    def first_token(self, model: str, seconds: float) -> None: ...

    def ended(self, model: str, seconds: float, finish: Finish) -> None:
        self.running -= 1


@given(
    st.lists(st.one_of(frames, st.sampled_from(["cancel 0", "cancel 1", "lost", "connected", "late"])), max_size=16),
    st.sampled_from([0.0, 1.0]),
    st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_no_sequence_of_frames_breaks_the_books(events: list[Any], return_s: float, seeded: bool) -> None:
    """Whether a lost router's requests wait for it or not, and go on by prefix or by replay."""
    balance, now = Balance(), 0.0
    session = Session(1.0, balance, lambda: now, [], return_s)
    session.attach(Link())
    receivers = [Receiver(str(number)) for number in range(STREAMS)]
    for receiver in receivers:
        session.open(receiver, GenerateRequest(model="m", sampling=SamplingParams(seed=1) if seeded else None))
    for event in events:
        if event == "lost":
            session.on_lost("gone", EVERY)
        elif event == "connected":
            session.on_connected()
        elif event == "late":
            now += return_s
            session.give_up()
        elif isinstance(event, str):
            session.cancel(event[-1])
        else:
            try:
                session.on_frame(event)
            except MalformedFrame:
                session.on_lost("malformed", EVERY)
        assert session.running == balance.running
    session.on_lost("the end", EVERY)
    session.close()
    assert session.running == balance.running == 0


class Echo:
    """A model's app that reads the body and answers."""

    name = "m"

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    async def list_models(self) -> list[dict[str, Any]]:
        return [{"id": "m"}]


@given(
    st.sampled_from(["GET", "POST", "PUT", "DELETE"]),
    st.one_of(st.sampled_from(["/v1/completions", "/v1/models/", "/v1/models/m"]), st.text(max_size=12)),
    st.lists(st.binary(max_size=40), min_size=1, max_size=4),
    st.lists(st.tuples(st.sampled_from([b"authorization", b"x-api-key", b"traceparent"]), st.binary(max_size=200))),
)
@settings(max_examples=300, deadline=None)
def test_any_request_gets_exactly_one_whole_answer(
    method: str, path: str, parts: list[bytes], headers: list[tuple[bytes, bytes]]
) -> None:
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

    async def send(message: Any) -> None:
        sent.append(message)

    app = Dispatch({"m": Echo(), "n": Echo()}, lambda: True, CallerRegistry(), max_body_bytes=100)
    asyncio.run(app({"type": "http", "method": method, "path": path, "headers": headers}, receive, send))
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert sent[0]["status"] in (200, 404, 413)
    if sent[0]["status"] != 200:
        assert json.loads(sent[1]["body"])["error"]["message"]


@given(st.lists(st.binary(max_size=30), min_size=1, max_size=5), st.sampled_from([200, 400, 429, 503]), st.booleans())
@settings(max_examples=300, deadline=None)
def test_the_guard_sends_one_start_and_one_end(bodies: list[bytes], status: int, sse: bool) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def run() -> None:
        guard = GuardedSend(send)
        headers = [(b"content-type", b"text/event-stream" if sse else b"application/json")]
        await guard({"type": "http.response.start", "status": status, "headers": headers})
        for number, content in enumerate(bodies):
            await guard({"type": "http.response.body", "body": content, "more_body": number < len(bodies) - 1})

    asyncio.run(run())
    assert [message["type"] for message in sent] == ["http.response.start", *["http.response.body"] * (len(sent) - 1)]
    assert [message.get("more_body", False) for message in sent[1:]] == [True] * (len(sent) - 2) + [False]
    assert b"".join(message["body"] for message in sent[1:]) == b"".join(bodies)


@given(st.text(max_size=200), st.text(max_size=20))
@settings(max_examples=300, deadline=None)
def test_a_template_comes_of_whole_chunks_only(noise: str, text: str) -> None:
    learn(noise)
    chunk = (
        'data: {"id":' + json.dumps(noise) + ',"choices":[{"index":0,"delta":{"content":' + json.dumps(text)
        + '},"logprobs":null,"finish_reason":null,"token_ids":null}]}\n\n'
    )  # fmt: skip
    template = learn(chunk)
    assert template is not None
    made = json.loads(template.chunk(noise).decode().removeprefix("data: "))
    assert made["id"] == noise
    assert made["choices"][0]["delta"]["content"] == noise
