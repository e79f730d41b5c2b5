"""What is fuzzed: one function of bytes for each place where bytes from outside are first read.

A target does with its input what the program does, and raises for whatever must not happen: an exception that is not
the one that place documents, a token lost or invented, an answer too many. test_fuzz.py runs each over its seeds and
a few thousand more, `make fuzz` over a million. Nothing here knows atheris, so any failing input can be run by hand:

    python -m tests.fuzz NAME FILE
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from google.protobuf.message import DecodeError

from megatoken.access.lease import LeaseTerms, sign, verify
from megatoken.cluster.spec.load import SpecError, dump_spec, load_spec
from megatoken.errors import AuthError, ForbiddenError, RequestError
from megatoken.process.supervise import Faults
from megatoken.router.edge.http.dispatch import Dispatch, model_of
from megatoken.router.edge.router_session.direct import learn
from megatoken.router.identity.api_keys import KeyRing
from megatoken.router.identity.callers import Caller, CallerRegistry
from megatoken.router.identity.shown_key import secret_in
from megatoken.router.intake.intake import on_frame
from megatoken.router.secure import EOF
from megatoken.router.shell.calls.client_session import ClientSession
from megatoken.tokens.frames import MalformedFrame, column
from megatoken.v1 import frame_columns_pb2, tokens_pb2
from megatoken.worker.engines.engine import EngineFacts
from megatoken.worker.engines.requests import check_request
from tests.support.router_core import CoreFleet

LOOP: Final = asyncio.new_event_loop()
REQUESTS: Final = 4  # that run when a worker's frames come in


def fail(_name: str, error: Exception) -> None:
    """In place of the count of a program's own faults: here each of them is a finding."""
    raise error


def parts(data: bytes, most: int = 8) -> list[bytes]:
    """The input as several messages: a byte says how long each is, 255 that it is all the rest."""
    found = []
    while data and len(found) < most:
        length, data = data[0], data[1:]
        length = len(data) if length == 255 else length
        found.append(data[:length])
        data = data[length:]
    return found


def made_frame(data: bytes) -> bytes:
    """A frame of small numbers, so that columns that nearly fit each other come up: a byte for the length of each."""
    streams, counts, tokens = data[0] % 8, data[1] % 8, data[2] % 16
    numbers = list(data[3 : 3 + streams + counts + tokens])
    numbers += [0] * (streams + counts + tokens - len(numbers))
    frame = tokens_pb2.Frame(token=numbers[streams + counts :])
    frame.stream.extend(number % 8 for number in numbers[:streams])
    frame.count.extend(number % 4 for number in numbers[streams : streams + counts])
    if len(data) > 3 + len(numbers):
        frame.finish.add(stream=data[-1] % 8, reason=data[-1] // 8 % 6)
    return frame.SerializeToString()


def frames(data: bytes) -> None:
    """A worker's messages at the router, some of whose requests it has."""
    fleet = CoreFleet(replicas=1, max_running=REQUESTS)
    requests = [fleet.submit(max_tokens=100) for _ in range(REQUESTS)]
    replica = fleet.replica_of(requests[0])
    for raw in parts(data):
        if not replica.connected:
            break
        made = raw[:1] == b"\x00" and len(raw) > 3  # no message begins so
        on_frame(fleet.state, replica, made_frame(raw[1:]) if made else raw, fleet.now)
    for request in requests:
        got = fleet.received(request)
        if fleet.end(request) is None:
            slot = request.slot
            kept = fleet.state.pages.read(slot, 0, len(got)).tolist() if slot >= 0 else got
            if kept != got:
                raise AssertionError(f"the client got {got}, the history has {kept}")
        fleet.cancel(request)
        if fleet.end(request) is None:
            raise AssertionError(f"{request.request_id} has no end")
    if fleet.state.live:
        raise AssertionError(f"{fleet.state.live} requests are left")


class _Call:
    """A Session call whose client sent these messages, and closed its half."""

    def __init__(self, messages: list[bytes]) -> None:
        self.messages, self.written = messages, b""
        self.aborted = ""

    async def send_initial_metadata(self, _metadata: Any) -> None: ...

    async def read(self) -> Any:
        return self.messages.pop(0) if self.messages else EOF

    async def write(self, message: bytes) -> None:
        tokens_pb2.Frame.FromString(message)

    async def abort(self, _code: Any, text: str) -> None:
        self.aborted = text


def session(data: bytes) -> None:
    """A client's messages on a Session at the router."""
    fleet = CoreFleet(replicas=1, max_running=2, limits={"max_streams_per_session": 8, "max_request_bytes": 2048})
    fleet.state.faults = Faults(fail)
    served = ClientSession(fleet.state, fleet.state.config, Caller())

    async def serve() -> None:
        with contextlib.suppress(TimeoutError):  # requests that run wait for a worker that says nothing
            async with asyncio.timeout(0.002):
                await served.serve(_Call(parts(data)))

    LOOP.run_until_complete(serve())
    if fleet.state.live:
        raise AssertionError(f"{fleet.state.live} requests of a session that is over are left")


FACTS: Final = EngineFacts("simulated", "1", 4096, 49_152, 8, 16, 10_000)


def requests(data: bytes) -> None:
    """A request as a worker checks it, whoever sent it."""
    try:
        request = frame_columns_pb2.GenerateRequest.FromString(data)
    except DecodeError:
        return
    try:
        checked = check_request(request, "m", FACTS)
    except RequestError as error:
        if len(str(error)) > 2000:
            raise AssertionError(f"an error of {len(str(error))} characters") from None
        return
    if not 1 <= len(checked.prompt) < FACTS.max_model_len or int(checked.prompt.max()) >= FACTS.vocab_size:
        raise AssertionError("a prompt that the engine does not take")


class _Echo:
    """A model's app that reads the body as vLLM's does, and says which model it named."""

    name = "m"

    def __init__(self) -> None:
        self.bodies: list[bytes] = []

    async def app(self, _scope: Any, receive: Any, send: Any) -> None:
        self.bodies.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    async def list_models(self) -> list[dict[str, Any]]:
        return [{"id": "m"}]


def bodies(data: bytes) -> None:
    """An HTTP exchange at the edge: headers, path and body, before vLLM sees it."""
    messages = parts(data, 3)
    header, path, body = (messages + [b""] * 3)[:3]
    sent: list[Any] = []
    waiting = [body[:7], body[7:]]

    async def receive() -> Any:
        part = waiting.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(waiting)}

    async def send(message: Any) -> None:
        sent.append(message)

    one, other = _Echo(), _Echo()
    app = Dispatch({"m": one, "n": other}, lambda: True, CallerRegistry(), max_body_bytes=2048)
    scope = {
        "type": "http",
        "method": "POST",
        "path": path.decode("latin-1") or "/v1/completions",
        "headers": [(b"authorization", header), (b"traceparent", header)],
    }
    LOOP.run_until_complete(app(scope, receive, send))
    if [message["type"] for message in sent] != ["http.response.start", "http.response.body"]:
        raise AssertionError(f"not one whole answer: {sent}")
    named = model_of(body)
    with contextlib.suppress(ValueError, RecursionError):
        read = json.loads(body)
        if named is not None and (not isinstance(read, dict) or read.get("model") != named):
            raise AssertionError(f"dispatch reads model {named!r} where vLLM reads {read!r}")
    if other.bodies and named != "n":
        raise AssertionError(f"a body for {named!r} went to model n")
    learn(body.decode("utf-8", "replace"))
    with contextlib.suppress(AuthError):
        secret_in([("authorization", header.decode("latin-1")), ("x-api-key", body.decode("latin-1"))])


def spec(data: bytes) -> None:
    """A cluster's spec."""
    try:
        loaded = load_spec(data.decode("utf-8", "replace"))
    except SpecError as error:
        if not error.problems:
            raise AssertionError("refused without a reason") from None
        return
    if load_spec(dump_spec(loaded)) != loaded:
        raise AssertionError("another spec is read back than was written")


_FILE: Final = os.memfd_create("keys.json")  # libFuzzer ends the process in a way that would leave a file behind
_KEYS: Final = Path(f"/proc/self/fd/{_FILE}")
_GOOD: Final = b'{"keys": [{"name": "kept", "sha256": "' + b"0" * 64 + b'"}]}'


def keys(data: bytes) -> None:
    """An API key file that is exchanged on a running router: what does not read leaves the last keys in force."""
    _KEYS.write_bytes(_GOOD)
    ring = KeyRing(_KEYS)
    _KEYS.write_bytes(data + b" ")  # another size than any before
    ring.refresh()
    with contextlib.suppress(ValueError):
        fresh = KeyRing(_KEYS)
        if ring.by_name("kept") != fresh.by_name("kept"):
            raise AssertionError("refreshed to something else than a start would read")
        return
    if ring.by_name("kept") is None:
        raise AssertionError("a file that does not read took the last keys away")


_LEASE_KEY: Final = bytes(range(32))
_TERMS: Final = LeaseTerms("id", "m-1", 7, "q", "m", 8, 16, 2_000_000_000)
SIGNED: Final = sign(_TERMS, _LEASE_KEY)


def lease(data: bytes) -> None:
    """A lease: only the one that was signed is one. Besides plain text an input is an edit of the good lease."""
    text = data.decode("utf-8", "ignore")
    if data[:1] == b"\x00" and len(data) >= 3:  # replace from a place on, so that mutations are near the good one
        at, length = data[1] % len(SIGNED), data[2] % 8
        text = SIGNED[:at] + data[3:].decode("utf-8", "ignore") + SIGNED[at + length :]
    try:
        found = verify(text, [_LEASE_KEY], replica="m-1", incarnation=7, request_id="q", now_s=1_900_000_000.0)
    except (AuthError, ForbiddenError):
        if text == SIGNED:
            raise AssertionError("the good lease was refused") from None
        return
    if text != SIGNED or found != _TERMS:
        raise AssertionError(f"a lease that nobody signed was taken: {text!r}")


def columns(data: bytes) -> None:
    """A packed column."""
    with contextlib.suppress(MalformedFrame):
        if column(data).tobytes() != data:
            raise AssertionError("another column than its bytes")


TARGETS: Final[dict[str, Callable[[bytes], None]]] = {
    function.__name__: function for function in (frames, session, requests, bodies, spec, keys, lease, columns)
}
