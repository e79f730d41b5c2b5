"""A request's way through router and worker as spans: real processes, and OTLP over a socket."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from megatoken.v1 import tokens_pb2, tokens_pb2_grpc
from tests.support.collector import Collector
from tests.support.phoenix import MISSING as NO_PHOENIX
from tests.support.phoenix import Phoenix
from tests.support.processes import Processes, Started

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    with Processes(tmp_path) as started:
        yield started


def start(
    processes: Processes, tracing: dict[str, Any], *, count: int = 2, **simulated: Any
) -> tuple[list[Started], Started]:
    """Workers and a router; one worker alone traces nothing."""
    workers = [
        processes.start(
            "worker",
            {
                "replica": f"m-{number}",
                "model": "m",
                "engine": "simulated",
                "counters_dir": str(processes.directory / "counters"),
                "simulated": simulated,
                "tracing": tracing if count > 1 else None,
            },
        )
        for number in range(count)
    ]
    replicas = [
        {
            "replica": worker.ready["replica"],
            "model": "m",
            "address": worker.address,
            "incarnation": str(worker.ready["incarnation"]),
            "phase": "REPLICA_PHASE_READY",
        }
        for worker in workers
    ]
    snapshot = {"epoch": "1", "version": "1", "replicas": replicas, "models": [{"model": "m"}]}
    return workers, processes.start("router", {"router": "r", "static_snapshot": snapshot, "tracing": tracing})


async def ask(router: Started, tokens: int, **fields: Any) -> int:
    """How many tokens came."""
    request = tokens_pb2.GenerateRequest(
        request_id="q-1", model="m", prompt=[5, 6, 7], sampling=tokens_pb2.SamplingParams(max_tokens=tokens), **fields
    )
    async with grpc.aio.insecure_channel(router.address) as channel:
        stream = tokens_pb2_grpc.TokensStub(channel).Generate(request, timeout=30)
        return sum([len(response.tokens) async for response in stream])


async def test_the_workers_span_hangs_below_the_routers_and_that_below_the_clients(processes: Processes) -> None:
    with Collector() as collector:
        _, router = await asyncio.to_thread(start, processes, {"endpoint": collector.endpoint, "sample": 0})
        assert await ask(router, 5) == 5, "of the sampled share, which is nought"
        assert await ask(router, 6, traceparent=f"00-{TRACE}-{SPAN}-01") == 6
        at_router, at_worker = await asyncio.to_thread(collector.wait, 2, TRACE)
        assert len(collector.spans()) == 2
    assert [one.service for one in (at_router, at_worker)] == ["megatoken-router", "megatoken-worker"]
    assert (at_router.parent, at_worker.parent) == (SPAN, at_router.span)
    assert at_router.began_ns <= at_worker.began_ns <= at_worker.ended_ns <= at_router.ended_ns
    assert at_router.events == ["placed", "first token"]
    assert at_worker.events == ["scheduled", "first token"]
    for one in (at_router, at_worker):
        assert one.attributes["megatoken.request_id"] == "q-1"
        assert one.attributes["gen_ai.usage.output_tokens"] == 6
        assert one.attributes["gen_ai.response.finish_reasons"] == ["length"]
        assert not one.failed
    assert at_router.attributes["megatoken.replica"] == at_worker.attributes["megatoken.replica"]


async def test_a_request_that_went_on_elsewhere_says_so(processes: Processes) -> None:
    with Collector() as collector:
        workers, router = await asyncio.to_thread(
            start, processes, {"endpoint": collector.endpoint, "sample": 1}, step_s=0.02
        )
        asking = [asyncio.create_task(ask(router, 100)) for _ in range(8)]  # some on each
        await asyncio.sleep(0.5)
        workers[0].kill()
        assert await asyncio.gather(*asking) == [100] * 8
        spans = await asyncio.to_thread(collector.wait, 16)
    at_router = {one.span: one for one in spans if one.service == "megatoken-router"}
    assert {one.attributes["megatoken.resumes"] for one in at_router.values()} == {0, 1}
    assert {one.attributes["gen_ai.usage.output_tokens"] for one in at_router.values()} == {100}
    at_worker = [one for one in spans if one.service == "megatoken-worker"]
    assert {one.parent for one in at_worker} == set(at_router), "the killed worker had no time for a span"
    assert {one.attributes["megatoken.replica"] for one in at_worker} == {"m-1"}


async def test_a_collector_that_is_not_there_disturbs_nobody(processes: Processes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and says nothing
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        _, router = await asyncio.to_thread(start, processes, {"endpoint": endpoint, "sample": 1}, count=1)
        for _ in range(20):
            assert await ask(router, 5) == 5
        began = time.monotonic()
        await asyncio.to_thread(router.stop)
        assert time.monotonic() - began < 10


@pytest.mark.skipif(bool(NO_PHOENIX), reason=NO_PHOENIX)
@pytest.mark.timeout(240)
async def test_a_collector_of_others_shows_router_and_worker_as_one_trace(processes: Processes, tmp_path: Path) -> None:
    with Phoenix(tmp_path) as phoenix:
        _, router = await asyncio.to_thread(start, processes, {"endpoint": phoenix.endpoint, "sample": 0})
        assert await ask(router, 6, traceparent=f"00-{TRACE}-{SPAN}-01") == 6
        at_router, at_worker = await asyncio.to_thread(phoenix.spans, 2)
    assert {span["context"]["trace_id"] for span in (at_router, at_worker)} == {TRACE}
    assert (at_router["parent_id"], at_worker["parent_id"]) == (SPAN, at_router["context"]["span_id"])
    assert [span["status_code"] for span in (at_router, at_worker)] == ["UNSET", "UNSET"]
    for span in (at_router, at_worker):
        assert span["attributes"]["megatoken.request_id"] == "q-1"
        assert span["attributes"]["gen_ai.usage.output_tokens"] == 6
