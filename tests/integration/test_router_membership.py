"""A router under a controller: snapshots, drains with a deadline, removal, and a controller that goes away."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Self

import grpc
import pytest
from google.protobuf import json_format

from megatoken.errors import UnavailableError
from megatoken.router.client.client import TokenClient
from megatoken.v1 import membership_pb2, membership_pb2_grpc
from tests.support.processes import Processes, Started

MODEL = "simulated"
PROMPT = list(range(10, 42))


class Controller(membership_pb2_grpc.MembershipServicer):
    """Serves Membership in this process; `publish` sends to all that watch."""

    def __init__(self, port: int = 0) -> None:
        self.snapshot: membership_pb2.Snapshot | None = None
        self.port = port
        self._news = asyncio.Condition()
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])

    async def __aenter__(self) -> Self:
        membership_pb2_grpc.add_MembershipServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self._server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._server.stop(None)

    async def publish(self, version: int, *members: dict[str, Any], epoch: int = 1) -> None:
        content = {"epoch": epoch, "version": version, "replicas": list(members), "models": [{"model": MODEL}]}
        self.snapshot = json_format.ParseDict(content, membership_pb2.Snapshot())
        async with self._news:
            self._news.notify_all()

    async def Watch(self, request: membership_pb2.WatchRequest, context: Any) -> AsyncIterator[membership_pb2.Snapshot]:
        sent = None
        while True:
            if self.snapshot is not None and self.snapshot is not sent:
                sent = self.snapshot
                yield sent
                continue
            async with self._news:
                await self._news.wait()


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    with Processes(tmp_path_factory.mktemp("membership")) as started:
        yield started


@pytest.fixture(scope="module")
def workers(processes: Processes) -> list[Started]:
    """Two workers of the same seed, 100 tokens/s a stream."""
    return [
        processes.start(
            "worker",
            {
                "replica": name,
                "model": MODEL,
                "engine": "simulated",
                "metrics_port": None,
                "counters_dir": str(processes.directory / "counters"),
                "simulated": {"step_s": 0.01, "max_running": 64, "max_model_len": 4096},
            },
        )
        for name in ("w0", "w1")
    ]


def member(worker: Started, **fields: Any) -> dict[str, Any]:
    ready = worker.ready
    return {
        "replica": ready["replica"],
        "model": MODEL,
        "address": ready["address"],
        "incarnation": str(ready["incarnation"]),
        "phase": "REPLICA_PHASE_READY",
        "max_model_len": 4096,
        "max_running": 64,
        **fields,
    }


def start_router(processes: Processes, name: str, port: int) -> Started:
    return processes.start(
        "router", {"router": name, "controllers": [f"127.0.0.1:{port}"], "metrics_port": None, "drain_s": 1.0}
    )


async def until_ready(client: TokenClient, replicas: int) -> None:
    async with asyncio.timeout(30):
        while [model.ready_replicas for model in await client.models()] != [replicas]:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def test_a_drained_replica_s_streams_move_at_the_deadline_and_are_unbroken(
    processes: Processes, workers: list[Started], tmp_path: Path
) -> None:
    first, second = workers
    async with Controller() as controller:
        await controller.publish(1, member(first))
        router = start_router(processes, "drains", controller.port)
        async with TokenClient([router.address]) as client:
            await until_ready(client, 1)
            expected = await client.generate(MODEL, PROMPT, max_tokens=300, temperature=0.0).tokens()
            stream = client.generate(MODEL, PROMPT, max_tokens=300, temperature=0.0)
            deltas = aiter(stream)
            tokens = list((await anext(deltas)).tokens)
            draining = member(first, phase="REPLICA_PHASE_DRAINING", drain_deadline_unix_s=time.time() + 0.3)
            await controller.publish(2, draining, member(second))
            tokens += [token async for delta in deltas for token in delta.tokens]
            assert tokens == expected
            assert stream.finish is not None
            assert (stream.finish.resumes, stream.finish.replica) == (1, "w1")
            await controller.publish(3, member(second))
            await until_ready(client, 1)
            assert await client.generate(MODEL, PROMPT, max_tokens=300, temperature=0.0).tokens() == expected


async def test_a_removed_replica_s_streams_go_on_elsewhere(processes: Processes, workers: list[Started]) -> None:
    first, second = workers
    async with Controller() as controller:
        await controller.publish(1, member(first))
        router = start_router(processes, "removes", controller.port)
        async with TokenClient([router.address]) as client:
            await until_ready(client, 1)
            stream = client.generate(MODEL, PROMPT, max_tokens=200, temperature=0.0)
            deltas = aiter(stream)
            tokens = list((await anext(deltas)).tokens)
            await controller.publish(2, member(second))
            tokens += [token async for delta in deltas for token in delta.tokens]
            assert len(tokens) == 200
            assert tokens == await client.generate(MODEL, PROMPT, max_tokens=200, temperature=0.0).tokens()


async def test_a_router_serves_on_while_its_controller_is_away_and_follows_the_next(
    processes: Processes, workers: list[Started]
) -> None:
    first, second = workers
    async with Controller() as controller:
        await controller.publish(7, member(first))
        router = start_router(processes, "alone", controller.port)
        client = TokenClient([router.address])
        await client.connect()
        await until_ready(client, 1)
        port = controller.port
    assert len(await client.generate(MODEL, PROMPT, max_tokens=5, temperature=0.0).tokens()) == 5
    async with Controller(port) as controller:
        await controller.publish(1, member(first), member(second), epoch=2)  # it lost its state: a new epoch
        await until_ready(client, 2)
    await client.close()


async def test_two_routers_share_two_replicas_evenly(processes: Processes, workers: list[Started]) -> None:
    async with Controller() as controller:
        await controller.publish(1, *(member(worker) for worker in workers))
        routers = [start_router(processes, f"pair-{i}", controller.port) for i in range(2)]
        for router in routers:
            async with TokenClient([router.address]) as client:
                await until_ready(client, 2)
        async with TokenClient([router.address for router in routers]) as client:
            async with asyncio.timeout(20):
                while len(client.open_sessions()) < 2:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
            streams = [client.generate(MODEL, [*PROMPT, i], max_tokens=40, temperature=0.0) for i in range(80)]
            await asyncio.gather(*(stream.tokens() for stream in streams))
            served = [stream.finish.replica for stream in streams if stream.finish]
            assert 24 <= served.count("w0") <= 56


async def test_a_router_that_knows_no_replica_yet_tells_nobody_that_no_model_is_served(
    processes: Processes, workers: list[Started]
) -> None:
    async with Controller() as controller:
        starting = asyncio.create_task(asyncio.to_thread(start_router, processes, "early", controller.port))
        await asyncio.sleep(2.5)
        assert not starting.done(), "it serves before it knows of any replica"
        await controller.publish(1, member(workers[0]))
        router = await starting
        async with TokenClient([router.address]) as client:
            assert len(await client.generate(MODEL, PROMPT, max_tokens=3).tokens()) == 3
    late = await asyncio.to_thread(start_router, processes, "alone", 1)  # nobody listens on port 1
    async with TokenClient([late.address]) as client:
        with pytest.raises(UnavailableError, match="has not been told of any replica"):
            await client.generate(MODEL, PROMPT, max_tokens=3).tokens()
