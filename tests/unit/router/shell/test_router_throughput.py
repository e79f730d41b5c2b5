"""router/shell/throughput.py: the agent's samples, passed on by RPC and as metrics."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from megatoken.errors import AuthError
from megatoken.router.shell.throughput import ClusterCollector, ThroughputRelay
from megatoken.v1 import throughput_pb2 as pb
from megatoken.v1 import throughput_pb2_grpc

REQUEST = pb.GetThroughputRequest()


def sample(tick: int) -> pb.ThroughputSample:
    windows = [pb.Window(seconds=1, generated_tokens_per_s=50.0 * tick), pb.Window(seconds=7)]
    row = pb.ThroughputRow(
        kind="cluster",
        name="demo",
        workers=pb.Totals(generated_tokens=100 * tick),
        routers=pb.Totals(generated_tokens=99 * tick),
        windows=windows,
        efficiency=0.9,
    )
    replica = pb.ThroughputRow(kind="replica", name="chat-0", workers=pb.Totals(generated_tokens=7))
    return pb.ThroughputSample(epoch=3, tick=tick, complete=True, ranks=2, rows=[row, replica])


def identify(metadata: object) -> None:
    if dict(metadata).get("key") == "wrong":  # type: ignore[call-overload]
        raise AuthError("an unknown key")


async def serve(servicer: throughput_pb2_grpc.ThroughputServicer) -> tuple[grpc.aio.Server, str]:
    server = grpc.aio.server()
    throughput_pb2_grpc.add_ThroughputServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, f"127.0.0.1:{port}"


class Agent(throughput_pb2_grpc.ThroughputServicer):
    """Sends the samples put into its queue; a None breaks the stream."""

    def __init__(self) -> None:
        self.samples: asyncio.Queue[pb.ThroughputSample | None] = asyncio.Queue()

    async def WatchThroughput(
        self, request: pb.GetThroughputRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.ThroughputSample]:
        while (found := await self.samples.get()) is not None:
            yield found
        await context.abort(grpc.StatusCode.UNAVAILABLE, "gone")


async def test_samples_pass_through_and_outlive_a_broken_stream() -> None:
    agent, relay = Agent(), ThroughputRelay(identify)
    (agent_server, agent_address), (server, address) = await serve(agent), await serve(relay)
    following = asyncio.create_task(relay.follow(agent_address, grpc.aio.insecure_channel))
    try:
        async with grpc.aio.insecure_channel(address) as channel, asyncio.timeout(30):
            stub = throughput_pb2_grpc.ThroughputStub(channel)
            with pytest.raises(grpc.aio.AioRpcError, match="no throughput agent"):
                await stub.GetThroughput(REQUEST)
            watch = stub.WatchThroughput(REQUEST)
            await agent.samples.put(sample(1))
            assert (await watch.read()).tick == 1
            await agent.samples.put(None)
            await agent.samples.put(sample(2))
            assert (await watch.read()).tick == 2
            assert await stub.GetThroughput(REQUEST) == sample(2)
            with pytest.raises(grpc.aio.AioRpcError, match="an unknown key"):
                await stub.GetThroughput(REQUEST, metadata=(("key", "wrong"),))
            watch.cancel()
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        await server.stop(0)
        await agent_server.stop(0)


def test_metrics_are_those_of_the_newest_sample_without_nodes_and_replicas() -> None:
    relay, registry = ThroughputRelay(identify), CollectorRegistry()
    registry.register(ClusterCollector(relay))
    assert generate_latest(registry) == b""
    relay.take(sample(2))
    labels = {"scope": "cluster", "name": "demo"}
    value = registry.get_sample_value
    assert value("megatoken_throughput_generated_tokens_total", {**labels, "ledger": "workers"}) == 200
    assert value("megatoken_throughput_generated_tokens_total", {**labels, "ledger": "routers"}) == 198
    assert value("megatoken_throughput_generated_tokens_per_second", {**labels, "window": "1s"}) == 100.0
    assert value("megatoken_throughput_efficiency_ratio", labels) == 0.9
    assert value("megatoken_throughput_complete") == 1
    assert b"chat-0" not in generate_latest(registry)
