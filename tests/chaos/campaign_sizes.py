"""Sizes just under, at and over every limit: who is over one fails alone, by name; live streams go on exactly.

At a router with small limits over a worker: a request, its prompt, its cache salt, its schema, the log probabilities
of its prompt, choices, priorities, times, all on one session with ten judged streams; then a session's streams, whole
messages, header bytes and key lengths, each on a connection of its own; whole messages straight at the worker; and, in
the long form, HTTP bodies at an edge.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import random
import re
from dataclasses import dataclass
from typing import Any, Final

import grpc
import httpx

from megatoken.errors import MegatokenError
from megatoken.router.client.client import TokenClient
from megatoken.tokens import wire
from megatoken.tokens.frames import pack
from megatoken.v1 import frame_columns_pb2, router_pb2, router_pb2_grpc
from tests.chaos.outcome import Outcome
from tests.chaos.routed import MODEL, Streams, one, ready, seed, start_router, start_worker
from tests.support.processes import Processes, Started

NAME = "sizes"
ABOUT = "sizes under, at and over every limit, beside ten live streams of the same session"

CONTEXT: Final = 4096
REQUEST_BYTES: Final = 200_000
MESSAGE_BYTES: Final = 1 << 20
HEADER_BYTES: Final = 8192
PROMPT_TOKENS: Final = 3000
MAX_N: Final = 8
TIMES_MS: Final = 60_000
SESSION_STREAMS: Final = 64
KEY: Final = "k" * 32
BODY_BYTES: Final = 300_000
EDGE_REQUEST_BYTES: Final = 2000
TOKEN_BYTES: Final = len(pack((5,)))  # in a prompt
NO_GRAMMAR: Final = "a simulated engine has no grammar"  # the worker's word: the size was let through


@dataclass(frozen=True)
class Size:
    """One request, and what its refusal must name; empty: it must be served."""

    name: str
    refusal: str
    prompt: tuple[int, ...] = (1, 2, 3)
    fields: dict[str, Any] | None = None
    sampling: dict[str, Any] | None = None


def padded(total: int, **kind: str) -> str:
    """A text that makes its request `total` bytes long, and JSON where it must be."""
    quoted = "json_schema" in kind.values()

    def encoded(text: str) -> int:
        message = frame_columns_pb2.GenerateRequest(model=MODEL, prompt=pack((1, 2, 3)))
        message.sampling.max_tokens, message.sampling.temperature = 4, 0.0
        if quoted:
            message.sampling.structured_outputs.json_schema = text
        else:
            message.cache_salt = text
        return len(message.SerializeToString())

    def make(size: int) -> str:
        return '"' + "s" * (size - 2) + '"' if quoted else "s" * size

    size = total - 40
    while encoded(make(size)) < total:
        size += 1
    return make(size)


def sizes() -> list[Size]:
    found: list[Size] = []
    for offset in (-1, 0, 1):
        over = offset > 0
        salt = padded(REQUEST_BYTES + offset)
        schema = {"structured_outputs": {"json_schema": padded(REQUEST_BYTES + offset, kind="json_schema")}}
        found += [
            Size(f"cache_salt {offset:+}", "request: " * over, fields={"cache_salt": salt}),
            Size(f"schema {offset:+}", "request: " if over else NO_GRAMMAR, sampling=schema),
            Size(f"prompt {offset:+}", "prompt: " * over, prompt=(5,) * (PROMPT_TOKENS + offset)),
            Size(f"max_tokens {offset:+}", "max_tokens: " * over, sampling={"max_tokens": CONTEXT - 3 + offset}),
            Size(f"n {offset:+}", "n: " * over, sampling={"n": MAX_N + offset, "temperature": 1.0}),
            Size(f"timeout_ms {offset:+}", "timeout_ms: " * over, fields={"timeout_ms": TIMES_MS + offset}),
            Size(f"max_delay_ms {offset:+}", "max_delay_ms: " * over, fields={"max_delay_ms": TIMES_MS + offset}),
            Size(f"priority {offset:+}", "priority: " * (offset < 0), fields={"priority": offset}),
            Size(f"vocabulary {offset:+}", "prompt: " * (offset >= 0), prompt=(49_152 + offset,)),
            Size(f"request_id {offset:+}", "request_id: " * over, fields={"request_id": "i" * (256 + offset)}),
            Size(f"stop {offset:+}", "stop_token_ids: " * over, sampling={"stop_token_ids": [1] * (4096 + offset)}),
        ]  # fmt: skip
    rows = PROMPT_TOKENS
    most = ((64 << 20) // rows - 4) // 8 - 1
    found.append(
        Size("prompt_logprobs +1", "prompt_logprobs: ", prompt=(5,) * rows, sampling={"prompt_logprobs": most + 1})
    )
    return found


def start_edge(processes: Processes, router: Started, keys_file: str) -> Started:
    settings = {
        "edge": "e",
        "router": router.address,
        "router_key": KEY,
        "api_keys_file": keys_file,
        "models": [{"name": MODEL, "source": "builtin:tiny-llama", "max_model_len": CONTEXT}],
        "limits": {"max_body_bytes": BODY_BYTES, "max_request_bytes": EDGE_REQUEST_BYTES},
    }
    return processes.start("router.edge", settings, timeout_s=240)


async def attempt(client: TokenClient, size: Size, outcome: Outcome) -> None:
    outcome.inputs += 1
    sampling = {"max_tokens": 4, "temperature": 0.0, **(size.sampling or {})}
    said = ""
    try:
        said = "no token"
        async for _ in client.generate(MODEL, size.prompt, fields=size.fields, **sampling):
            said = ""
            break  # it is served; thousands more would show no more
    except MegatokenError as error:
        said = str(error)
    if bool(said) != bool(size.refusal) or size.refusal not in said:
        outcome.wrong += 1
        outcome.problem(f"{size.name}: {said[:160] or 'served'}; expected {size.refusal or 'to be served'}")


async def whole_messages(address: str, outcome: Outcome) -> None:
    """A message over the limit ends its session, which says so; one at the limit does not."""
    for total, fits in ((MESSAGE_BYTES, True), (MESSAGE_BYTES + 1, False)):
        outcome.inputs += 1
        start = wire.start(1, frame_columns_pb2.GenerateRequest(model="nobody").SerializeToString())
        rest = total - len(start)
        body = start + b"\xfa\x3f" + wire.varint(rest - 5) + b"x" * (rest - 5)  # an unknown field of the rest
        async with grpc.aio.insecure_channel(address) as channel:
            call = channel.stream_stream("/megatoken.v1.Tokens/Session")(
                metadata=(("authorization", f"Bearer {KEY}"),), timeout=20
            )
            try:
                await call.write(body)
                await call.done_writing()
                while await call.read() is not grpc.aio.EOF:
                    pass
            except grpc.aio.AioRpcError:
                pass
            code = await call.code()
        if len(body) != total or (code is grpc.StatusCode.OK) is not fits:
            outcome.wrong += 1
            outcome.problem(f"a message of {len(body)} bytes, limit {MESSAGE_BYTES}: {code}")


async def session_streams(address: str, outcome: Outcome) -> None:
    """As many requests as a session may have run; one more is refused alone, and takes no other's place."""
    message = frame_columns_pb2.GenerateRequest(model=MODEL, prompt=pack((1, 2, 3)))
    message.sampling.max_tokens, message.sampling.temperature, message.sampling.ignore_eos = 20, 0.0, True
    encoded = message.SerializeToString()
    for count in (SESSION_STREAMS - 1, SESSION_STREAMS, SESSION_STREAMS + 1):
        outcome.inputs += 1
        refused: list[tuple[int, str]] = []
        served: set[int] = set()
        async with grpc.aio.insecure_channel(address) as channel:
            call = channel.stream_stream("/megatoken.v1.Tokens/Session")(
                metadata=(("authorization", f"Bearer {KEY}"),), timeout=20
            )
            await call.write(b"".join(wire.start(number, encoded) for number in range(1, count + 1)))
            await call.done_writing()
            while (raw := await call.read()) is not grpc.aio.EOF:
                for finish in frame_columns_pb2.Frame.FromString(raw).finish:
                    if finish.code:
                        refused.append((finish.stream, finish.message))
                    else:
                        served.add(finish.stream)
        over = count > SESSION_STREAMS
        as_told = [stream for stream, text in refused if f"at most {SESSION_STREAMS} at once" in text]
        if (
            served != set(range(1, min(count, SESSION_STREAMS) + 1))
            or as_told != [count] * over
            or as_told != [stream for stream, _ in refused]
        ):
            outcome.wrong += 1
            outcome.problem(f"{count} streams in a session: {len(served)} served, refused {refused[:3]}")


async def headers(address: str, outcome: Outcome) -> None:
    """Keys of any length are compared; headers over the limit are refused by the transport, call by call."""
    wanted = {
        len(KEY): grpc.StatusCode.OK,
        1: grpc.StatusCode.UNAUTHENTICATED,
        HEADER_BYTES // 2: grpc.StatusCode.UNAUTHENTICATED,
        4 * HEADER_BYTES: grpc.StatusCode.RESOURCE_EXHAUSTED,
    }
    async with grpc.aio.insecure_channel(address) as channel:
        stub = router_pb2_grpc.RouterStub(channel)
        for length, code in wanted.items():
            outcome.inputs += 1
            found = grpc.StatusCode.OK
            try:
                shown = (("authorization", "Bearer " + "k" * length),)
                await stub.ListModels(router_pb2.ListModelsRequest(), metadata=shown, timeout=10)
            except grpc.aio.AioRpcError as error:
                found = error.code()
            if found is not code:
                outcome.wrong += 1
                outcome.problem(f"a key of {length} characters: {found}, expected {code}")


async def bodies(edge: str, outcome: Outcome) -> None:
    """HTTP bodies at the edge, and what it makes of them for the router."""

    async def answered(content: bytes, status: int, says: str = "") -> str:
        outcome.inputs += 1
        answer = await client.post("/v1/completions", content=content)
        if answer.status_code != status or says not in answer.text:
            outcome.wrong += 1
            outcome.problem(f"a body of {len(content)} bytes: {answer.status_code} {answer.text[:160]}, not {status}")
        return answer.text

    def asking(tokens: int) -> bytes:
        return json.dumps({"model": MODEL, "prompt": [5] * tokens, "max_tokens": 4, "temperature": 0}).encode()

    shown = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    async with httpx.AsyncClient(base_url=edge, headers=shown, timeout=30) as client:
        for total, status in ((BODY_BYTES - 1, 200), (BODY_BYTES, 200), (BODY_BYTES + 1, 413)):
            await answered(asking(1).ljust(total), status)
        refused = await answered(asking(PROMPT_TOKENS), 400, f"at most {EDGE_REQUEST_BYTES} bytes")
        told = re.search(r"(\d+) bytes", refused)
        over = int(told[1]) - EDGE_REQUEST_BYTES if told else 0
        fits = PROMPT_TOKENS - math.ceil(over / TOKEN_BYTES)
        for tokens, status in ((fits - 1, 200), (fits, 200), (fits + 1, 400)):
            await answered(asking(tokens), status)


async def run(scale: float) -> Outcome:
    """The table is run once and again, in another order, as `scale` allows."""
    outcome, number = Outcome(simulated=True), seed()
    rng = random.Random(number)
    limits = {
        "max_request_bytes": REQUEST_BYTES,
        "max_message_bytes": MESSAGE_BYTES,
        "max_header_bytes": HEADER_BYTES,
        "max_prompt_tokens": PROMPT_TOKENS,
        "max_n": MAX_N,
        "max_streams_per_session": SESSION_STREAMS,
        "max_timeout_ms": TIMES_MS,
        "max_delay_ms": TIMES_MS,
    }
    with Processes() as processes:
        keys = processes.directory / "keys.json"
        keys.write_text(json.dumps({"keys": [{"name": "t", "sha256": hashlib.sha256(KEY.encode()).hexdigest()}]}))
        worker = start_worker(
            processes, "w0", {"max_running": 256, "decode_tokens_per_s": 20_000}, max_message_mib=MESSAGE_BYTES >> 20
        )
        router = start_router(processes, worker, limits=limits, api_keys_file=str(keys))
        async with TokenClient([router.address], api_key=KEY) as client:
            await ready(client)
            async with Streams(client, outcome):
                for _ in range(max(1, round(10 * scale))):
                    for size in rng.sample(sizes(), len(sizes())):
                        await attempt(client, size, outcome)
                    await session_streams(router.address, outcome)
                    await whole_messages(router.address, outcome)
                    await whole_messages(worker.address, outcome)
                    await headers(router.address, outcome)
                if scale >= 1.0:  # an edge takes half a minute to start
                    edge = await asyncio.to_thread(start_edge, processes, router, str(keys))
                    await bodies(f"http://{edge.address}", outcome)
            await one(client)
    if outcome.problems:
        outcome.problem(f"MEGATOKEN_SEED={number}")
    return outcome
