"""Many simulated replicas in one process, for load: each Session is a replica that makes tokens at a fixed rate.

Honest about frames: one frame an engine step and session, with every running stream's token, as a worker sends them.
A token's value is the microsecond at which its frame was made (CLOCK_MONOTONIC, the same for all processes of a
machine), so the receiver can tell how long it took. Started by the benchmark with one JSON argument; prints a JSON
line with the addresses when ready.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import grpc
import numpy as np
import uvloop
from grpc import aio

from megatoken.process.tree import die_with_parent
from megatoken.tokens import wire
from megatoken.tokens.frames import U32, column
from megatoken.v1 import frame_columns_pb2, tokens_pb2, worker_pb2

LOAD_EVERY_S = 0.5


class Replica:
    """The engine of one session: `rate` tokens/s over a batch of at most `batch`, a frame every batch/rate seconds."""

    def __init__(self, rate: float, batch: int, step_s: float | None = None) -> None:
        self.rate = rate
        self.batch = batch
        self.step_s = step_s if step_s is not None else batch / rate
        self.stream = np.empty(0, U32)
        self.left = np.empty(0, np.int64)
        self.made = np.empty(0, np.int64)
        self.arrived: list[tuple[int, int]] = []
        self.cancelled: set[int] = set()
        self.generated = 0
        self.prompted = 0
        self.busy_us = 0

    def take(self, raw: bytes) -> None:
        frame = frame_columns_pb2.ClientFrame.FromString(raw)
        for start in frame.start:
            self.arrived.append((start.stream, start.request.sampling.max_tokens or 16))
            self.prompted += len(start.request.prompt) // 4
        self.cancelled.update(column(frame.cancel).tolist())

    def step(self, now_us: int) -> bytes:
        """One engine step: the encoded frame, empty when nothing runs."""
        room = self.batch - len(self.stream)
        if self.arrived and room > 0:
            fresh, self.arrived = self.arrived[:room], self.arrived[room:]
            self.stream = np.concatenate([self.stream, np.array([s for s, _ in fresh], U32)])
            self.left = np.concatenate([self.left, np.array([n for _, n in fresh], np.int64)])
            self.made = np.concatenate([self.made, np.zeros(len(fresh), np.int64)])
        pieces: list[bytes] = []
        if self.cancelled:
            self._cancel(pieces)
        n = len(self.stream)
        if n:
            token = np.full(n, now_us & 0xFFFFFFFF, U32)
            columns = wire.delimited(b"\x0a", self.stream.tobytes()) + wire.delimited(b"\x1a", token.tobytes())
            pieces.insert(0, columns)
            self.generated += n
            self.left -= 1
            self.made += 1
            done = self.left <= 0
            if done.any():
                for stream, made in zip(self.stream[done].tolist(), self.made[done].tolist(), strict=True):
                    finish = tokens_pb2.Finish(stream=stream, reason=2, generated_tokens=made, prompt_tokens=1)
                    pieces.append(wire.delimited(b"\x2a", finish.SerializeToString()))
                self._keep(~done)
        return b"".join(pieces)

    def load(self) -> bytes:
        load = tokens_pb2.Load(
            running=len(self.stream),
            waiting=len(self.arrived),
            prompt_tokens=self.prompted,
            generated_tokens=self.generated,
            busy_us=self.busy_us,
        )
        return wire.delimited(b"\x32", load.SerializeToString())

    def _cancel(self, pieces: list[bytes]) -> None:
        gone = np.isin(self.stream, np.fromiter(self.cancelled, U32, len(self.cancelled)))
        self.arrived = [entry for entry in self.arrived if entry[0] not in self.cancelled]
        for stream in self.cancelled:
            finish = tokens_pb2.Finish(stream=stream, reason=tokens_pb2.FINISH_REASON_CANCELLED)
            pieces.append(wire.delimited(b"\x2a", finish.SerializeToString()))
        self.cancelled.clear()
        self._keep(~gone)

    def _keep(self, kept: Any) -> None:
        self.stream, self.left, self.made = self.stream[kept], self.left[kept], self.made[kept]


async def serve(context: Any, replica: Replica) -> None:
    async def read() -> None:
        while True:
            raw = await context.read()
            if raw is aio.EOF:
                return
            replica.take(raw)

    reader = asyncio.create_task(read())
    due = time.monotonic() + replica.step_s * np.random.default_rng(id(replica)).random()
    load_due = due
    try:
        while not reader.done():
            now = time.monotonic()
            if now < due:
                await asyncio.sleep(due - now)
                continue
            due = max(due + replica.step_s, now - 5 * replica.step_s)  # catches up after a pause, within reason
            frame = replica.step(time.monotonic_ns() // 1000)
            if frame:
                replica.busy_us += int(replica.step_s * 1e6)
            if now >= load_due:
                load_due = now + LOAD_EVERY_S
                frame += replica.load()
            if frame:
                await context.write(frame)
    finally:
        reader.cancel()


async def listen(name: str, settings: dict[str, Any]) -> tuple[aio.Server, str]:
    """One replica's own server, since a router asks who answers at an address."""
    server = aio.server(options=[("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", -1)])

    async def session(_: Any, context: Any) -> None:
        await serve(context, Replica(settings["rate"], settings["batch"], settings.get("step_s")))

    async def get_load(_: bytes, context: Any) -> bytes:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "the benchmark's replicas report in frames only")
        return b""

    async def describe(_: bytes, _context: Any) -> bytes:
        return worker_pb2.DescribeResponse(replica=name, incarnation=1).SerializeToString()

    tokens = {"Session": grpc.stream_stream_rpc_method_handler(session)}
    worker = {
        "GetLoad": grpc.unary_unary_rpc_method_handler(get_load),
        "Describe": grpc.unary_unary_rpc_method_handler(describe),
    }
    server.add_generic_rpc_handlers(
        (
            grpc.method_handlers_generic_handler("megatoken.v1.Tokens", tokens),
            grpc.method_handlers_generic_handler("megatoken.v1.Worker", worker),
        )
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, f"127.0.0.1:{port}"


async def main(settings: dict[str, Any]) -> None:
    """Serves the replicas m-0, m-1 and so on."""
    listening = [await listen(f"m-{i}", settings) for i in range(settings["replicas"])]
    print(json.dumps({"addresses": [address for _, address in listening]}), flush=True)
    await asyncio.gather(*(server.wait_for_termination() for server, _ in listening))


if __name__ == "__main__":
    die_with_parent()
    uvloop.run(main(json.loads(sys.argv[1])))
