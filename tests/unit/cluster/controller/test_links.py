"""Renewals on real gRPC: a worker that does not answer costs no other its lease."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc

from megatoken.cluster.controller.links import Links
from megatoken.cluster.decide.fleet import Replica, WorkerFacts
from megatoken.cluster.decide.liveness import LivenessLimits
from megatoken.cluster.decide.replica import ReplicaState
from megatoken.cluster.placement.place import Placement, Rank
from megatoken.v1 import tokens_pb2, worker_pb2, worker_pb2_grpc

LIMITS = LivenessLimits(lease_s=30.0, hang_s=60.0, probe_s=30.0)


class Worker(worker_pb2_grpc.WorkerServicer):
    """Counts renewals; a silent one takes for ever to answer."""

    def __init__(self, silent: bool) -> None:
        self.silent, self.renewals, self.ranks = silent, [], []  # type: ignore[var-annotated]

    async def Renew(self, request: Any, context: Any) -> worker_pb2.RenewResponse:
        self.renewals.append(request.stamp_s)
        self.ranks.append(request.cpu_ranks)
        if self.silent:
            await asyncio.sleep(60)
        return worker_pb2.RenewResponse(stamp_s=100.0 + len(self.renewals), load=tokens_pb2.Load(steps=1))


async def test_one_that_does_not_answer_keeps_no_other_waiting_and_the_first_time_counts_at_once() -> None:
    workers, servers, replicas = [Worker(silent=True), Worker(silent=False)], [], []
    for number, worker in enumerate(workers, start=1):
        server = grpc.aio.server()
        worker_pb2_grpc.add_WorkerServicer_to_server(worker, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        servers.append(server)
        ranks = (Rank(0, "n", number, "cpu"), Rank(1, f"n{number}", 0, "cpu"))
        placement = Placement(f"m-{number}", "m", ranks)
        facts = WorkerFacts(f"127.0.0.1:{port}", number, "simulated")
        replicas.append(Replica(f"m-{number}", "m", "r", 1, placement, 0.0, state=ReplicaState.READY, facts=facts))
    links = Links(None)
    try:
        for _ in range(5):
            links.renew(replicas, LIMITS)
            await asyncio.sleep(0.1)
        assert workers[1].renewals[:2] == [0.0, 101.0], "at once a second one, which gives time"
        assert len(workers[1].renewals) >= 5
        assert len(workers[0].renewals) == 1, "one at a time"
        assert {*workers[0].ranks, *workers[1].ranks} == {2}, "both are on one node: each is told of the other"
        assert links.liveness.lease_until_s("m-2", LIMITS, 0.0) > time.monotonic() + 29.0
    finally:
        await links.close()
        for server in servers:
            await server.stop(None)


async def test_what_computes_on_accelerators_is_told_nothing_of_cores() -> None:
    worker, server = Worker(silent=False), grpc.aio.server()
    worker_pb2_grpc.add_WorkerServicer_to_server(worker, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    facts = WorkerFacts(f"127.0.0.1:{port}", 1, "vllm")
    placement = Placement("m-1", "m", (Rank(0, "n", 0, "mi355x"),))
    links = Links(None)
    try:
        links.renew([Replica("m-1", "m", "r", 1, placement, 0.0, state=ReplicaState.READY, facts=facts)], LIMITS)
        async with asyncio.timeout(10):
            while not worker.ranks:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        assert set(worker.ranks) == {0}
    finally:
        await links.close()
        await server.stop(None)
