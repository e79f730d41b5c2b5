"""The load of the router benchmark: many streams over a few Sessions, or one Generate call a stream.

Started by the benchmark with one JSON argument; prints one JSON line of what it saw. Streams that end are replaced,
so the number of streams stays; the measured window begins after the warm-up.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from typing import Any

import numpy as np
import uvloop
from grpc import aio

from megatoken.process.tree import die_with_parent
from megatoken.router.client.columns import ColumnSession
from megatoken.router.client.leases import LeaseClient
from megatoken.tokens.frames import column, pack
from megatoken.v1 import frame_columns_pb2, router_pb2, router_pb2_grpc, tokens_pb2

BUCKET_US = 100
BUCKETS = 20_000  # 2 s


class Seen:
    """What arrived in the measured window."""

    def __init__(self) -> None:
        self.measuring = False
        self.tokens = 0
        self.messages = 0
        self.requests = 0
        self.errors: dict[str, int] = {}
        self.added = np.zeros(BUCKETS, np.int64)

    def tokens_came(self, token: np.ndarray) -> None:
        if not self.measuring:
            return
        now_us = np.uint32((time.monotonic_ns() // 1000) & 0xFFFFFFFF)
        late_us = (now_us - token).astype(np.uint32)  # wraps as it should
        self.added += np.bincount(np.minimum(late_us // BUCKET_US, BUCKETS - 1), minlength=BUCKETS)
        self.tokens += len(token)
        self.messages += 1

    def percentile_ms(self, share: float) -> float:
        total = self.added.sum()
        return float(np.searchsorted(np.cumsum(self.added), share * total) * BUCKET_US / 1000) if total else 0.0


def requests(settings: dict[str, Any], rng: random.Random, low: int, high: int) -> Any:
    """Encoded requests, ever on, out of a prepared set."""
    prepared = []
    numbers = np.random.default_rng(rng.randrange(1 << 30))
    for _ in range(64):
        prompt = pack(numbers.integers(1, 30_000, settings["prompt"]))
        request = frame_columns_pb2.GenerateRequest(model="m", prompt=prompt)
        request.sampling.max_tokens = rng.randint(low, high)
        request.sampling.temperature = 0.0
        prepared.append(request.SerializeToString())
    while True:
        yield prepared[rng.randrange(len(prepared))]


async def session_load(settings: dict[str, Any], seen: Seen, rng: random.Random) -> None:
    low, high = settings["tokens"]
    make = requests(settings, rng, low, high)
    opening = requests(settings, rng, 1, high)  # so that ends are spread out from the beginning

    async def one(count: int) -> None:
        session = ColumnSession(settings["router"])
        await session.open(10)

        async def fill() -> None:
            for i in range(count):
                session.submit(next(opening))
                if i % 100 == 99:
                    await asyncio.sleep(100 * settings["ramp_s"] / settings["streams"])

        filling = asyncio.create_task(fill())
        async for frame in session.frames():
            if frame.token:
                seen.tokens_came(column(frame.token))
            for finish in frame.finish:
                seen.requests += seen.measuring
                if finish.reason == tokens_pb2.FINISH_REASON_ERROR:
                    seen.errors[finish.message] = seen.errors.get(finish.message, 0) + 1
                    await asyncio.sleep(0.01)
                session.submit(next(make))
        await filling

    share = settings["streams"] // settings["sessions"]
    await asyncio.gather(*(one(share) for _ in range(settings["sessions"])))


async def generate_load(settings: dict[str, Any], seen: Seen, rng: random.Random) -> None:
    make = requests(settings, rng, *settings["tokens"])
    channel = aio.insecure_channel(settings["router"])
    call_generate = channel.unary_stream("/megatoken.v1.Tokens/Generate")

    async def one() -> None:
        while True:
            call = call_generate(next(make))
            while True:
                raw = await call.read()
                if raw is aio.EOF:
                    break
                message = frame_columns_pb2.GenerateResponse.FromString(raw)
                if message.tokens:
                    seen.tokens_came(column(message.tokens))
            seen.requests += seen.measuring

    await asyncio.gather(*(one() for _ in range(settings["streams"])))


async def lease_load(settings: dict[str, Any], seen: Seen, _: random.Random) -> None:
    """Assign and Release over one call, as a client with many requests makes them."""
    ask = router_pb2.AssignRequest(model="m", prompt_tokens=128, max_tokens=128)
    await asyncio.sleep(1)
    async with LeaseClient(settings["router"]) as leases:

        async def one() -> None:
            while True:
                leases.release(await leases.assign(ask))
                seen.requests += seen.measuring

        await asyncio.gather(*(one() for _ in range(settings["streams"])))


async def assign_load(settings: dict[str, Any], seen: Seen, _: random.Random) -> None:
    channel = aio.insecure_channel(settings["router"])
    stub = router_pb2_grpc.RouterStub(channel)
    ask = router_pb2.AssignRequest(model="m", prompt_tokens=128, max_tokens=128)
    await asyncio.sleep(1)

    async def one() -> None:
        while True:
            lease = await stub.Assign(ask, timeout=10)
            await stub.Release(router_pb2.ReleaseRequest(lease=lease.lease, generated_tokens=128), timeout=10)
            seen.requests += seen.measuring

    await asyncio.gather(*(one() for _ in range(settings["streams"])))


async def sse_load(settings: dict[str, Any], seen: Seen, rng: random.Random) -> None:
    """Streamed completions over HTTP, a connection a stream; counts the chunks that carry text."""
    host, _, port = settings["router"].rpartition(":")

    async def one() -> None:
        reader, writer = await asyncio.open_connection(host, int(port), limit=1 << 20)
        while True:
            prompt = [rng.randrange(100, 30_000) for _ in range(settings["prompt"])]
            body = {"model": settings["model"], "prompt": prompt, "max_tokens": settings["tokens"][0], "stream": True}
            content = json.dumps({**body, "temperature": 0, "ignore_eos": True}).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
            writer.write(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
            tail = b""
            while b"0\r\n\r\n" not in tail:
                data = await reader.read(1 << 16)
                if not data:
                    raise ConnectionError("the edge closed the connection")
                if seen.measuring:
                    seen.tokens += data.count(b'"text"')
                    seen.messages += 1
                tail = (tail + data)[-32:]
            seen.requests += seen.measuring

    await asyncio.gather(*(one() for _ in range(settings["streams"])))


async def main(settings: dict[str, Any]) -> None:
    seen = Seen()
    rng = random.Random(7)
    loads = {"generate": generate_load, "assign": assign_load, "lease": lease_load, "sse": sse_load}
    load = {**loads, "session": session_load}[settings["kind"]]
    running = asyncio.create_task(load(settings, seen, rng))
    await asyncio.sleep(settings["ramp_s"] + settings["warm_s"])
    print("measuring", flush=True)
    seen.measuring = True
    began = time.monotonic()
    await asyncio.wait({running}, timeout=settings["measure_s"])
    took = time.monotonic() - began
    seen.measuring = False
    if running.done():
        running.result()
    running.cancel()
    print(
        json.dumps(
            {
                "tokens": seen.tokens,
                "seconds": took,
                "messages": seen.messages,
                "requests": seen.requests,
                "errors": seen.errors,
                "added_ms_p50": seen.percentile_ms(0.5),
                "added_ms_p99": seen.percentile_ms(0.99),
            }
        ),
        flush=True,
    )


if __name__ == "__main__":
    die_with_parent()
    uvloop.run(main(json.loads(sys.argv[1])))
