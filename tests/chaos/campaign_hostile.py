"""Hostile clients beside well-behaved streams, at a router and straight at a worker.

The streams must go on exactly, the event loops of both processes must not be held up, and what the hostile ones cost in
memory must be bounded, at its peak. The lag is of the process's own clock (megatoken_*_loop_lag_seconds); where other
work holds the cores it is large without any attack, so it is also measured with the same streams undisturbed, just
before, and may be three times that.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import resource
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, Final, TypeAlias

import grpc

from megatoken.errors import MegatokenError
from megatoken.router.client.client import TokenClient
from megatoken.tokens import wire
from megatoken.tokens.frames import pack
from megatoken.v1 import frame_columns_pb2
from tests.chaos.outcome import Outcome
from tests.chaos.routed import (
    MODEL,
    PROMPT,
    Streams,
    forget_peak,
    lag_counts,
    lag_ms,
    one,
    peak_bytes,
    ready,
    resident_bytes,
    scrape,
    seed,
    start_router,
    start_worker,
)
from tests.support.processes import Processes, Started

NAME = "hostile"
ABOUT = "clients that flood, hang, lie and never read, beside ten streams that must not notice"

LAG_MS: Final = 50.0  # at p99.9; or LAG_RATIO times what it is undisturbed, where that is more
LAG_RATIO: Final = 3.0
UNDISTURBED_S: Final = 12.0  # some 240 of the loop's timers, of which p99.9 is the largest
GROWTH: Final = 3.0  # of resident memory, at its peak; a router begins at some 100 MiB
CONNECTIONS: Final = 2000
DESCRIPTORS: Final = 8192  # of this process and its children, so that CONNECTIONS are an attack and not the end of both
TAKEN_S: Final = 15.0  # for a process to have no descriptor left
LEFT: Final = 64  # descriptors that a process has left when it is made to run out of them


def request(**sampling: Any) -> bytes:
    message = frame_columns_pb2.GenerateRequest(model=MODEL, prompt=pack(PROMPT))
    for name, value in sampling.items():
        setattr(message.sampling, name, value)
    encoded: bytes = message.SerializeToString()
    return encoded


@contextlib.asynccontextmanager
async def session(address: str) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        call = channel.stream_stream("/megatoken.v1.Tokens/Session")()
        try:
            yield call
        finally:
            call.cancel()


async def send(call: Any, *messages: bytes) -> None:
    """As much as is taken within a second each; a session that was ended is no harm to who ended it."""
    with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError, TimeoutError):
        for message in messages:
            async with asyncio.timeout(1.0):
                await call.write(message)


async def turned_away(call: Any) -> None:
    """Waits for the session's end; what a worker said of its load comes before its status."""
    async with asyncio.timeout(20):
        with contextlib.suppress(grpc.aio.AioRpcError):
            while await call.read() is not grpc.aio.EOF:
                pass
        if await call.code() is not grpc.StatusCode.INVALID_ARGUMENT:
            raise RuntimeError(f"turned away with {await call.code()}")


async def empty_starts(address: str, rng: random.Random) -> None:
    async with session(address) as call:
        await send(call, *[b"\x0a\x00" * rng.randrange(20_000, 32_000)] * 4)


async def more_starts_than_allowed(address: str, _rng: random.Random) -> None:
    async with session(address) as call:
        await send(call, b"\x0a\x00" * 1_000_000)
        await turned_away(call)


async def many_choices(address: str, rng: random.Random) -> None:
    async with session(address) as call:
        asked = request(n=128, max_tokens=rng.randrange(200, 400), temperature=1.0)
        await send(call, *(wire.start(1 + 128 * number, asked) for number in range(8)))
        await asyncio.sleep(0.3)


async def cancels(address: str, rng: random.Random) -> None:
    async with session(address) as call:
        numbers = rng.sample(range(1 << 32), 1000) * 1000
        await send(call, wire.start(1, request(max_tokens=50)), *[wire.cancel(numbers)] * 2)


async def refusals_unread(address: str, _rng: random.Random) -> None:
    async with session(address) as call:
        wrong = wire.start(5, frame_columns_pb2.GenerateRequest(model="nobody").SerializeToString())
        await send(call, *[wrong * 5000] * 6)


async def generate_unread(address: str, _rng: random.Random) -> None:
    async with grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        method = channel.unary_stream("/megatoken.v1.Tokens/Generate")
        calls = [method(request(max_tokens=2000, ignore_eos=True), timeout=5) for _ in range(50)]
        await asyncio.sleep(1.0)
        for call in calls:
            call.cancel()


async def no_frames(address: str, rng: random.Random) -> None:
    async with session(address) as call:
        await send(call, b"\xff" + rng.randbytes(rng.randrange(1 << 18)))
        await turned_away(call)


async def half_open(address: str, rng: random.Random) -> None:
    """Connections that say nothing, or half of what HTTP/2 begins with, or no HTTP/2 at all."""
    async with connections(address, CONNECTIONS, rng) as connected:
        await asyncio.sleep(0.3)
    if connected < CONNECTIONS // 2:
        raise RuntimeError(f"only {connected} of {CONNECTIONS} connections came about: no attack")


@contextlib.asynccontextmanager
async def connections(address: str, count: int, rng: random.Random) -> AsyncIterator[int]:
    """So many connections without a call; yields how many came about."""
    host, _, port = address.rpartition(":")
    opened: list[socket.socket] = []
    connected = 0
    try:
        for number in range(count):
            made = socket.socket()
            opened.append(made)
            made.setblocking(False)
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(0.5):
                    await asyncio.get_running_loop().sock_connect(made, (host, int(port)))
                    connected += 1
                    said = (b"", b"PRI * HTTP/2.0\r\n\r\nSM", rng.randbytes(200))[number % 3]
                    made.send(said)
        yield connected
    finally:
        for made in opened:
            made.close()


Attack: TypeAlias = Callable[[str, random.Random], Coroutine[Any, Any, None]]

HOSTILE: Final[tuple[Attack, ...]] = (
    *(empty_starts, more_starts_than_allowed, many_choices, cancels, refusals_unread),
    *(generate_unread, no_frames, half_open),
)


async def exhaust(victim: Started, rng: random.Random, outcome: Outcome) -> None:
    """Connections take every descriptor that a process may have: it serves on, and takes new callers after that.

    Its limit is lowered for the while, to LEFT more than it has open.
    """
    outcome.inputs += 1
    before = 0
    while (now := descriptors(victim)) != before:  # what earlier attacks left is closed first
        before = now
        await asyncio.sleep(0.3)
    limits = resource.prlimit(victim.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(victim.pid, resource.RLIMIT_NOFILE, (descriptors(victim) + LEFT, limits[1]))
    try:
        async with connections(victim.address, 4 * LEFT, rng):
            most = resource.prlimit(victim.pid, resource.RLIMIT_NOFILE)[0]
            deadline = time.monotonic() + TAKEN_S
            while descriptors(victim) < most:  # a busy machine accepts them late
                if time.monotonic() > deadline:
                    raise RuntimeError(f"{descriptors(victim)} of {most} descriptors are open: no attack")
                await asyncio.sleep(0.05)
            await asyncio.sleep(1.0)
    finally:
        resource.prlimit(victim.pid, resource.RLIMIT_NOFILE, limits)
    try:
        async with asyncio.timeout(20), TokenClient([victim.address]) as client:
            await one(client)
    except (TimeoutError, MegatokenError) as error:
        outcome.wrong += 1
        outcome.problem(f"it takes no new caller after it had no descriptor left: {type(error).__name__}: {error}")


def descriptors(process: Started) -> int:
    """How many it has open."""
    return len(os.listdir(f"/proc/{process.pid}/fd"))


async def run(scale: float) -> Outcome:
    outcome, number = Outcome(simulated=True), seed()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, DESCRIPTORS)), hard))
    try:
        return await _run(scale, outcome, number)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def _run(scale: float, outcome: Outcome, number: int) -> Outcome:
    rng = random.Random(number)
    order = rng.sample(HOSTILE, len(HOSTILE))
    attacks = {part: list(HOSTILE) * round(4 * scale) for part in ("router", "worker")}
    if scale < 1.0:  # each attack once, at one of the two
        attacks = {"router": order[::2], "worker": order[1::2]}
    with Processes() as processes:
        # At 4000 tokens/s over 256 places a judged stream takes six seconds: too long for the short form.
        speed = 4000 if scale >= 1.0 else 20_000
        worker = start_worker(processes, "w0", {"max_running": 256, "decode_tokens_per_s": speed})
        router = start_router(processes, worker)
        for part, victim in (("router", router), ("worker", worker)):
            async with TokenClient([victim.address if part == "router" else router.address]) as client:
                await ready(client)
                async with Streams(client, outcome):
                    begun = lag_counts(await asyncio.to_thread(scrape, victim), part)
                    await asyncio.sleep(UNDISTURBED_S * scale)
                    before, small = lag_counts(await asyncio.to_thread(scrape, victim), part), resident_bytes(victim)
                    forget_peak(victim)
                    await _attack(victim.address, rng, attacks[part], outcome)
                    await exhaust(victim, rng, outcome)
                    after, large = lag_counts(await asyncio.to_thread(scrape, victim), part), peak_bytes(victim)
            undisturbed, found = lag_ms(begun, before), lag_ms(before, after)
            outcome.loop_lag_ms_p999 = max(outcome.loop_lag_ms_p999 or 0.0, found)
            outcome.rss_growth_ratio = round(max(outcome.rss_growth_ratio or 0.0, large / small), 2)
            if found > max(LAG_MS, LAG_RATIO * undisturbed) and scale >= 1.0:  # the short form has too few timers
                outcome.wrong += 1
                outcome.problem(f"{part}: its loop was {found:.0f} ms late at p99.9, undisturbed {undisturbed:.0f} ms")
            if large / small > GROWTH:
                outcome.leaked += 1
                outcome.problem(f"{part}: {small >> 20} MiB became {large >> 20} MiB at its peak")
            if victim.process.poll() is not None:
                outcome.lost += 1
                outcome.problem(f"{part}: ended with {victim.process.returncode}")
    if outcome.problems:
        outcome.problem(f"MEGATOKEN_SEED={number}")
    return outcome


async def _attack(address: str, rng: random.Random, attacks: list[Attack], outcome: Outcome) -> None:
    for hostile in rng.sample(attacks, len(attacks)):
        outcome.inputs += 1
        try:
            async with asyncio.timeout(30):
                await hostile(address, rng)
        except TimeoutError:
            outcome.wrong += 1
            outcome.problem(f"{hostile.__name__}: not turned away within 30 s")
