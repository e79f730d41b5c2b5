"""One Session call of the router's, without gRPC: what one client may do to the others of the process."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from megatoken.router.config import RouterConfig
from megatoken.router.core.state import RouterState
from megatoken.router.fleet.fleet import EndpointTable
from megatoken.router.identity.callers import Caller
from megatoken.router.secure import EOF
from megatoken.router.shell.calls.client_session import CANCELS_AT_ONCE, MAX_REFUSALS, REQUESTS_AT_ONCE, ClientSession
from megatoken.router.streams.ledger import RouterLedger
from megatoken.tokens import wire
from megatoken.tokens.fields import FIELDS_AT_ONCE, fields_at_most
from megatoken.tokens.frames import pack
from megatoken.v1 import tokens_pb2
from tests.support.router_core import CoreFleet

ClientFrame, GenerateRequest = tokens_pb2.ClientFrame, tokens_pb2.GenerateRequest
INVALID_ARGUMENT, NOT_FOUND = 3, 5


class Aborted(Exception):
    pass


class Context:
    """The gRPC context of a client that sends `messages` and, while `reads` is set, reads what comes."""

    def __init__(self, *messages: bytes) -> None:
        self.messages = list(messages)
        self.reads = asyncio.Event()
        self.reads.set()
        self.frames: list[tokens_pb2.Frame] = []

    async def send_initial_metadata(self, _metadata: Any) -> None: ...

    async def read(self) -> Any:
        return self.messages.pop(0) if self.messages else EOF

    async def write(self, message: bytes) -> None:
        await self.reads.wait()
        self.frames.append(tokens_pb2.Frame.FromString(message))

    async def abort(self, code: Any, details: str) -> None:
        raise Aborted(f"{code.name}: {details}")

    def finishes(self) -> list[tokens_pb2.Finish]:
        return [finish for frame in self.frames for finish in frame.finish]


def session(**settings: Any) -> ClientSession:
    config = RouterConfig(router="r", **settings)
    state = RouterState(config, RouterLedger(), random.Random(1), EndpointTable(config.admission, config.breaker))
    return ClientSession(state, config, Caller())


def starts(count: int, n: int = 0, **fields: Any) -> bytes:
    sampling = tokens_pb2.SamplingParams(n=n) if n else None
    frame = ClientFrame()
    for number in range(count):
        frame.start.add(stream=number * max(1, n), request=GenerateRequest(sampling=sampling, **fields))
    return frame.SerializeToString()


@pytest.mark.parametrize("n", [0, 16])
async def test_a_message_of_many_requests_lets_others_have_their_turn(n: int) -> None:
    turns = 0

    async def another_client() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    choices = REQUESTS_AT_ONCE * 20
    context = Context(starts(choices // max(1, n), n))
    other = asyncio.create_task(another_client())
    await session()._read(context)
    other.cancel()
    assert turns >= choices // REQUESTS_AT_ONCE - 1  # the other's first turn only brings it to where it counts


async def test_a_client_that_leaves_many_requests_behind_lets_others_have_their_turn() -> None:
    count, turns = REQUESTS_AT_ONCE * 20, 0
    fleet = CoreFleet(replicas=1, max_running=8)
    made = ClientSession(fleet.state, fleet.state.config, Caller())
    context = Context(starts(count, model="m", prompt=pack((1, 2, 3))))
    serving = asyncio.create_task(made.serve(context))
    while len(made.requests) < count:  # noqa: ASYNC110
        await asyncio.sleep(0)
    serving.cancel()
    while not serving.done():
        await asyncio.sleep(0)
        turns += 1
    assert turns >= count // REQUESTS_AT_ONCE
    assert not made.requests
    assert fleet.state.live == 0


async def test_a_message_of_many_cancels_lets_others_have_their_turn() -> None:
    turns = 0

    async def another_client() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    other = asyncio.create_task(another_client())
    await session()._read(Context(wire.cancel(range(CANCELS_AT_ONCE * 20 + 1))))
    other.cancel()
    assert turns >= 19  # the other's first turn only brings it to where it counts


async def test_refusals_that_nobody_reads_stop_the_reading_and_all_come_in_the_end() -> None:
    requests = 4 * MAX_REFUSALS // 128
    context = Context(starts(requests, n=128))
    context.reads.clear()
    made = session()
    serving = asyncio.create_task(made.serve(context))
    for _ in range(20 * requests // REQUESTS_AT_ONCE + 100):
        await asyncio.sleep(0)
    assert made.outbox.refusals <= MAX_REFUSALS + REQUESTS_AT_ONCE * 128
    context.reads.set()
    await asyncio.wait_for(serving, 20)
    assert sorted(finish.stream for finish in context.finishes()) == list(range(requests * 128))


async def test_a_client_that_only_sends_is_cut_off() -> None:
    context = Context(starts(4 * MAX_REFUSALS // 128, n=128))
    context.reads.clear()
    with pytest.raises(Aborted, match="read nothing"):
        await asyncio.wait_for(session(limits={"client_stall_s": 0.1}).serve(context), 10)


async def test_a_refused_request_ends_each_number_that_it_could_have_had() -> None:
    context = Context(starts(1, n=3), starts(1, n=1000, model="m"))
    await session().serve(context)
    finishes = context.finishes()
    assert [(finish.stream, finish.code) for finish in finishes[:3]] == [(0, NOT_FOUND), (1, NOT_FOUND), (2, NOT_FOUND)]
    assert [(finish.stream, finish.code) for finish in finishes[3:]] == [(0, INVALID_ARGUMENT)]
    assert "n: 1000 is not allowed; 1 to 128" in finishes[3].message


async def test_a_message_of_too_many_requests_ends_its_session() -> None:
    with pytest.raises(Aborted, match="at most 1000 requests"):
        await session(limits={"max_streams_per_session": 1000}).serve(Context(b"\x0a\x00" * 1002))
    with pytest.raises(Aborted, match="at most 1000 requests"):
        await session(limits={"max_streams_per_session": 1000}).serve(Context(starts(1002, prompt=pack([1, 2]))))


async def test_counting_fields_stops_at_what_is_no_message() -> None:
    assert await fields_at_most(b"\x0a" * 5000, 1000)  # each is a length, of ten bytes
    assert not await fields_at_most(b"\x08\x01" * 1001, 1000)
    assert not await fields_at_most(b"\x0d\x00\x00\x00\x00" * 1001, 1000)
    assert await fields_at_most(b"\x0b" * 5000, 1000)
    assert await fields_at_most(b"\xff" * 5000, 1000)


async def test_counting_many_fields_lets_others_have_their_turn() -> None:
    turns = 0

    async def another_client() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    other = asyncio.create_task(another_client())
    assert not await fields_at_most(b"\x0a\x00" * 100_000, FIELDS_AT_ONCE * 20)
    other.cancel()
    assert turns >= 19


def test_a_finish_is_encoded_once_for_many_streams() -> None:
    encoded = tokens_pb2.Finish(stream=7, code=3, message="no").SerializeToString()
    assert tokens_pb2.Finish.FromString(wire.finish_of(9, encoded)) == tokens_pb2.Finish(stream=9, code=3, message="no")


async def test_a_request_that_is_too_large_is_refused_alone() -> None:
    message = ClientFrame()
    message.start.add(stream=1, request=GenerateRequest(model="m", prompt=[1], cache_salt="s" * 3000))
    message.start.add(stream=2, request=GenerateRequest(model="m", prompt=[1]))
    context = Context(message.SerializeToString())
    await session(limits={"max_request_bytes": 2000}).serve(context)
    assert [(finish.stream, finish.code) for finish in context.finishes()] == [(1, INVALID_ARGUMENT), (2, NOT_FOUND)]
    assert "request: '30" in context.finishes()[0].message


async def test_a_writer_that_is_cancelled_as_its_pause_ends_is_cancelled() -> None:
    served = session()

    async def write() -> None:
        await served._pause(30.0, urgent=False)
        await asyncio.Event().wait()

    pausing = asyncio.create_task(write())
    await asyncio.sleep(0.01)
    served._urgent.set()
    await asyncio.sleep(0)
    pausing.cancel()
    await asyncio.wait({pausing}, timeout=1.0)
    assert pausing.cancelled()
