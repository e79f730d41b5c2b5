"""A controller that only pretends: serves Control, Throughput and Router for tests of `top` and `events`.

    python -m tests.support.fake_control        prints its address, and each request that would change the cluster

Its replicas are named simulated, as they are. Nothing of it is part of the product.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import AsyncIterator

import grpc

from megatoken.v1 import control_pb2, control_pb2_grpc, router_pb2, router_pb2_grpc, throughput_pb2, throughput_pb2_grpc


class FakeCluster(
    control_pb2_grpc.ControlServicer, throughput_pb2_grpc.ThroughputServicer, router_pb2_grpc.RouterServicer
):
    """Three replicas of two models on two nodes; drain and scale change what it says of them."""

    def __init__(self) -> None:
        self.address = ""
        self.wanted = {"chat": 2, "code": 1}
        self.draining: set[str] = set()
        self.requests: list[str] = []
        self.events = [
            control_pb2.Event(
                sequence=1, unix_s=time.time(), kind="replica.state", subject="chat-1", message="STARTING -> READY"
            )
        ]
        self._tick = itertools.count(1)

    def replicas(self) -> list[control_pb2.ReplicaStatus]:
        found = []
        for model, wanted in self.wanted.items():
            for number in range(wanted):
                name = f"{model}-{number}"
                state = "DRAINING" if name in self.draining else "READY"
                found.append(
                    control_pb2.ReplicaStatus(
                        replica=name,
                        model=model,
                        state=state,
                        engine="simulated",
                        node=f"node-{'ab'[number % 2]}",
                        age_s=100 * (number + 1),
                        running=3 + number,
                        waiting=number,
                        kv_usage=0.25 * (number + 1),
                        generated_tokens_per_s=100.0 * (number + 1),
                        generated_tokens=123_456,
                    )
                )
        return found

    def sample(self) -> throughput_pb2.ThroughputSample:
        rate = 1000 + 200 * math.sin(time.time())
        windows = [
            throughput_pb2.Window(seconds=seconds, generated_tokens_per_s=rate, prompt_tokens_per_s=50.0)
            for seconds in (1, 10, 60, 300)
        ]
        row = throughput_pb2.ThroughputRow(kind="cluster", name="fake", windows=windows, efficiency=0.93)
        return throughput_pb2.ThroughputSample(
            epoch=1, tick=next(self._tick), unix_s=time.time(), complete=True, ranks=2, backend="gloo", rows=[row]
        )

    async def GetStatus(
        self, request: control_pb2.GetStatusRequest, context: grpc.aio.ServicerContext
    ) -> control_pb2.ClusterStatus:
        replicas = self.replicas()
        models = [
            control_pb2.ModelStatus(
                model=model,
                wanted=wanted,
                ready=sum(replica.model == model and replica.state == "READY" for replica in replicas),
                running=sum(replica.running for replica in replicas if replica.model == model),
                generated_tokens_per_s=sum(r.generated_tokens_per_s for r in replicas if r.model == model),
            )
            for model, wanted in self.wanted.items()
        ]
        nodes = [control_pb2.NodeStatus(node=f"node-{name}", state="alive", devices=4) for name in "ab"]
        router = control_pb2.ProcessStatus(name="router-0", kind="router", state="READY", address=self.address)
        return control_pb2.ClusterStatus(
            cluster="fake", generation=4, nodes=nodes, models=models, replicas=replicas, processes=[router]
        )

    async def Scale(
        self, request: control_pb2.ScaleRequest, context: grpc.aio.ServicerContext
    ) -> control_pb2.ScaleResponse:
        if request.replicas > 9:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "replicas: 10 is not allowed; at most 9")
        self._note(f"scale {request.model} {request.replicas}", request.model)
        self.wanted[request.model] = request.replicas
        return control_pb2.ScaleResponse(generation=5)

    async def DrainTarget(
        self, request: control_pb2.DrainTargetRequest, context: grpc.aio.ServicerContext
    ) -> control_pb2.DrainTargetResponse:
        self._note(f"drain {request.replica}", request.replica)
        self.draining.add(request.replica)
        return control_pb2.DrainTargetResponse(replicas=[request.replica])

    def _note(self, what: str, subject: str) -> None:
        self.requests.append(what)
        print(what, flush=True)
        number = len(self.events) + 1
        self.events.append(
            control_pb2.Event(sequence=number, unix_s=time.time(), kind="asked", subject=subject, message=what)
        )

    async def WatchEvents(
        self, request: control_pb2.WatchEventsRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[control_pb2.Event]:
        sent = request.after_sequence
        while True:
            for event in self.events[sent:]:
                yield event
                sent = event.sequence
            if not request.follow:
                return
            await asyncio.sleep(0.1)

    async def WatchThroughput(
        self, request: throughput_pb2.GetThroughputRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[throughput_pb2.ThroughputSample]:
        while True:
            yield self.sample()
            await asyncio.sleep(0.5)

    async def GetRouterStatus(
        self, request: router_pb2.GetRouterStatusRequest, context: grpc.aio.ServicerContext
    ) -> router_pb2.RouterStatus:
        return router_pb2.RouterStatus(
            router="router-0", ttft_ms=[4.3, 9.0, 640.0], itl_ms=[1.1, 2.0, 12.5], ceiling=0.97, held_back_by="idle"
        )


async def start(cluster: FakeCluster) -> grpc.aio.Server:
    """Serves on a free loopback port, written to `cluster.address`."""
    server = grpc.aio.server()
    control_pb2_grpc.add_ControlServicer_to_server(cluster, server)
    throughput_pb2_grpc.add_ThroughputServicer_to_server(cluster, server)
    router_pb2_grpc.add_RouterServicer_to_server(cluster, server)
    cluster.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    return server


async def main() -> None:
    cluster = FakeCluster()
    server = await start(cluster)
    print(cluster.address, flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(main())
