"""A worker process with the simulated engine: everything that needs a socket, a signal or a second process."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from megatoken.counters import INDEX, read_counters
from megatoken.v1 import tokens_pb2 as pb
from megatoken.v1 import worker_pb2, worker_pb2_grpc
from tests.support.processes import Processes, Started
from tests.support.worker_client import SESSION, TestSession, generate, request

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE.value[0]


def config(directory: Path, **simulated: Any) -> dict[str, Any]:
    return {
        "replica": "sim-0",
        "model": "m",
        "engine": "simulated",
        "simulated": {"decode_tokens_per_s": 2000, "max_running": 20, **simulated},
        "counters_dir": str(directory),
    }


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    with Processes() as started:
        yield started


@pytest.fixture(scope="module")
def worker(processes: Processes, tmp_path_factory: pytest.TempPathFactory) -> Started:
    return processes.start("worker", config(tmp_path_factory.mktemp("counters")))


@pytest.fixture
async def channel(worker: Started) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(worker.address) as opened:
        yield opened


def counters(started: Started, directory: Path) -> dict[str, int]:
    path = directory / f"sim-0.{started.ready['incarnation']}.counters"
    _header, values = read_counters(path)
    return {name: values[position] for name, position in INDEX.items()}


async def test_the_ready_line_and_describe_agree(worker: Started, channel: grpc.aio.Channel) -> None:
    described = await worker_pb2_grpc.WorkerStub(channel).Describe(worker_pb2.DescribeRequest(), timeout=10)
    assert described.engine == worker.ready["engine"] == "simulated"
    for name in (
        "replica",
        "incarnation",
        "max_model_len",
        "vocab_size",
        "max_running",
        "block_size",
        "kv_cache_tokens",
    ):
        assert getattr(described, name) == worker.ready[name]


async def test_health_and_reflection_are_served(channel: grpc.aio.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    for service in ("", "megatoken.v1.Tokens", "megatoken.v1.Worker"):
        answer = await health.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    async for answer in stub.ServerReflectionInfo(asked, timeout=10):
        names = {service.name for service in answer.list_services_response.service}
    assert {"megatoken.v1.Tokens", "megatoken.v1.Worker", "grpc.health.v1.Health"} <= names


async def test_generate_and_session_give_the_same_tokens(channel: grpc.aio.Channel) -> None:
    alone, finish = await generate(channel, [5, 6, 7], max_tokens=12)
    assert len(alone) == finish.generated_tokens == 12
    async with TestSession(channel) as session:
        await session.start({number: request([5, 6, 7], max_tokens=12) for number in (3, 9)})
        await session.until(3, 9)
    assert session.tokens == {3: alone, 9: alone}


async def test_a_resumed_request_continues_exactly(channel: grpc.aio.Channel) -> None:
    whole, _ = await generate(channel, [8, 9], max_tokens=10)
    async with TestSession(channel) as session:
        await session.start({1: request([8, 9, *whole[:4]], resumed_tokens=4, max_tokens=6)})
        await session.until(1)
    assert session.tokens[1] == whole[4:]
    finish = session.finishes[1]
    assert (finish.prompt_tokens, finish.generated_tokens, finish.resume_note) == (2, 10, "")


async def test_one_frame_a_step_carries_every_stream(channel: grpc.aio.Channel) -> None:
    async with TestSession(channel) as session:
        await session.start({number: request([4], max_tokens=50) for number in range(20)})
        await session.until(*range(20))
    assert session.frames <= 50 + 10  # a frame a step, and a few that only tell the load
    assert session.loads
    assert max(load.running for load in session.loads) == 20


async def test_errors_and_cancels_are_each_requests_own(channel: grpc.aio.Channel) -> None:
    async with TestSession(channel) as session:
        await session.start(
            {
                1: request([4], max_tokens=1000),
                2: request([99_999_999], max_tokens=5),
                3: request([4], timeout_ms=50, max_tokens=100_000),
                4: request([4], max_tokens=30),
            }
        )
        await session.until_tokens(1, 5)
        await session.cancel(1, 77)
        await session.until(1, 2, 3, 4)
    assert session.finishes[1].reason == pb.FINISH_REASON_CANCELLED
    assert session.finishes[1].generated_tokens >= 5
    assert session.finishes[2].code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert session.finishes[3].code == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
    assert len(session.tokens[4]) == 30


async def test_generate_tells_errors_as_its_status(channel: grpc.aio.Channel) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await generate(channel, [1], temperature=-1.0)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "sampling.temperature" in (caught.value.details() or "")


async def test_closing_the_half_lets_running_ones_end(channel: grpc.aio.Channel) -> None:
    async with TestSession(channel) as session:
        await session.start({1: request([4], max_tokens=60)})
        await session.call.done_writing()
        async with asyncio.timeout(30):
            while await session.read() is not None:
                pass
        assert await session.call.code() == grpc.StatusCode.OK
    assert len(session.tokens[1]) == 60


async def running(channel: grpc.aio.Channel) -> int:
    load = await worker_pb2_grpc.WorkerStub(channel).GetLoad(worker_pb2.GetLoadRequest(), timeout=10)
    return load.running + load.waiting


async def until_idle(channel: grpc.aio.Channel) -> None:
    async with asyncio.timeout(10):
        while await running(channel):  # noqa: ASYNC110 - another process's state
            await asyncio.sleep(0.01)


async def test_a_cancelled_call_leaves_nothing_running(channel: grpc.aio.Channel) -> None:
    async with TestSession(channel) as session:
        await session.start({number: request([4], max_tokens=100_000) for number in range(30)})
        await session.until_tokens(1, 2)
    await until_idle(channel)


async def read_out(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


@pytest.mark.parametrize(
    "raw", [b"\xff\xff\xff", b"\x12\x03abc", b"\x0a\x04\x12\x02\x0a\xff"], ids=["garbage", "odd column", "cut off"]
)
async def test_bytes_that_are_no_frame_end_only_their_session(channel: grpc.aio.Channel, raw: bytes) -> None:
    call = channel.stream_stream(SESSION)()
    await call.write(raw)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asyncio.wait_for(read_out(call), 10)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    tokens, _ = await generate(channel, [5], max_tokens=2)
    assert len(tokens) == 2


async def test_a_number_used_twice_ends_the_session_and_its_requests(channel: grpc.aio.Channel) -> None:
    async with TestSession(channel) as session:
        await session.start({1: request([4], max_tokens=100_000)})
        await session.start({1: request([4], max_tokens=5)})
        with pytest.raises(grpc.aio.AioRpcError, match="stream: 1") as caught:
            await session.until(1, timeout_s=10)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    await until_idle(channel)


async def test_a_caller_that_does_not_read_delays_no_other(worker: Started, channel: grpc.aio.Channel) -> None:
    own_connection = [("grpc.use_local_subchannel_pool", 1)]
    async with (
        grpc.aio.insecure_channel(worker.address, options=own_connection) as other,
        TestSession(other) as lazy,
        TestSession(channel) as keen,
    ):
        await lazy.start({number: request([4], max_tokens=20_000) for number in range(10)})
        await lazy.until_tokens(0, 1)
        for number in range(20):
            began = time.monotonic()
            await keen.start({number: request([4], max_tokens=5)})
            await keen.until(number)
            assert time.monotonic() - began < 5.0
    await until_idle(channel)


async def test_the_deep_check_makes_a_token(channel: grpc.aio.Channel) -> None:
    stub = worker_pb2_grpc.WorkerStub(channel)
    before = await stub.GetLoad(worker_pb2.GetLoadRequest(), timeout=10)
    assert (await stub.Probe(worker_pb2.ProbeRequest(), timeout=10)).seconds > 0
    after = await stub.GetLoad(worker_pb2.GetLoadRequest(), timeout=10)
    assert before.generated_tokens == after.generated_tokens  # a probe is nobody's traffic


async def test_the_prefix_cache_is_not_claimed_to_be_empty(channel: grpc.aio.Channel) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in worker_pb2_grpc.WorkerStub(channel).WatchPrefixes(worker_pb2.WatchPrefixesRequest(), timeout=10):
            pass
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


async def test_three_accounts_agree_to_the_token(processes: Processes, tmp_path: Path) -> None:
    worker = processes.start("worker", config(tmp_path))
    async with grpc.aio.insecure_channel(worker.address) as channel:
        async with TestSession(channel) as session:
            await session.start({number: request([4] * 7, max_tokens=10 + number) for number in range(25)})
            await session.until(*range(25))
            await session.start({100: request([4], max_tokens=1), 101: request([70_000])})
            await session.until(100, 101)
        tokens, _ = await generate(channel, [4, 4], max_tokens=9)
        received = sum(len(made) for made in session.tokens.values()) + len(tokens)
        await until_idle(channel)
        load = await worker_pb2_grpc.WorkerStub(channel).GetLoad(worker_pb2.GetLoadRequest(), timeout=10)
    shown = await asyncio.to_thread(scrape, worker)
    counted = counters(worker, tmp_path)
    assert counted["generated_tokens"] == load.generated_tokens == received
    assert shown["megatoken_worker_generated_tokens_total"] == received
    assert counted["prompt_tokens"] == load.prompt_tokens == 25 * 7 + 1 + 2
    assert shown["megatoken_worker_prompt_tokens_total"] == counted["prompt_tokens"]
    assert (counted["requests_started"], counted["requests_finished"], counted["requests_failed"]) == (27, 27, 0)
    assert shown["megatoken_worker_time_to_first_token_seconds_count"] == 27
    assert shown["megatoken_worker_inter_token_latency_seconds_count"] == received - 27
    assert worker.stop() == 0
    assert counters(worker, tmp_path) == counted  # readable after the process


def scrape(worker: Started) -> dict[str, float]:
    with urllib.request.urlopen(f"http://{worker.ready['metrics_address']}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    assert 'engine="simulated"' in text
    values: dict[str, float] = {}
    for line in text.splitlines():
        if line.startswith("megatoken_worker_"):
            name, _, value = line.rpartition(" ")
            bare = name.partition("{")[0]
            values[bare] = values.get(bare, 0) + float(value)
    return values


async def test_drain_refuses_then_sigterm_ends(processes: Processes, tmp_path: Path) -> None:
    worker = processes.start("worker", config(tmp_path))
    async with grpc.aio.insecure_channel(worker.address) as channel, TestSession(channel) as session:
        await session.start({1: request([4], max_tokens=300)})
        await session.until_tokens(1, 1)
        stub = worker_pb2_grpc.WorkerStub(channel)
        assert (await stub.Drain(worker_pb2.DrainRequest(), timeout=10)).running == 1
        await session.start({2: request([4], max_tokens=1)})
        await session.until(2)
        assert session.finishes[2].code == UNAVAILABLE
        os.kill(worker.pid, signal.SIGTERM)
        await session.until(1)
    assert session.finishes[1].reason == pb.FINISH_REASON_LENGTH
    assert await asyncio.to_thread(worker.stop) == 0


async def test_sigterm_ends_what_does_not_end_by_itself(processes: Processes, tmp_path: Path) -> None:
    worker = processes.start("worker", {**config(tmp_path), "stop_timeout_s": 0.2})
    async with grpc.aio.insecure_channel(worker.address) as channel, TestSession(channel) as session:
        await session.start({1: request([4], max_tokens=100_000)})
        await session.until_tokens(1, 1)
        os.kill(worker.pid, signal.SIGTERM)
        await session.until(1)
    assert session.finishes[1].code == UNAVAILABLE
    assert await asyncio.to_thread(worker.stop) == 0


async def test_a_dead_engine_ends_streams_and_the_process(processes: Processes, tmp_path: Path) -> None:
    worker = processes.start("worker", config(tmp_path, faults=[{"kind": "die", "after_tokens": 40}]))
    async with grpc.aio.insecure_channel(worker.address) as channel, TestSession(channel) as session:
        await session.start({number: request([4], max_tokens=1000) for number in range(4)})
        await session.until(*range(4))
    assert {finish.code for finish in session.finishes.values()} == {UNAVAILABLE}
    assert {len(tokens) for tokens in session.tokens.values()} == {10}
    assert await asyncio.to_thread(wait_exit, worker) == 1
    assert "simulated engine died" in worker.output()
    assert counters(worker, tmp_path)["generated_tokens"] == 40


def wait_exit(worker: Started) -> int:
    return worker.process.wait(timeout=10)


async def test_a_hanging_engine_is_seen_by_the_deep_check_only(processes: Processes, tmp_path: Path) -> None:
    worker = processes.start("worker", config(tmp_path, faults=[{"kind": "hang", "after_s": 0}]))
    async with grpc.aio.insecure_channel(worker.address) as channel:
        health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await worker_pb2_grpc.WorkerStub(channel).Probe(worker_pb2.ProbeRequest(), timeout=0.5)
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED


def run_worker(directory: Path, fields: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    path = directory / "worker.json"
    path.write_text(json.dumps(fields))
    command = [sys.executable, "-m", "megatoken.worker", "--config", str(path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_port_in_use_is_told_in_one_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run_worker(tmp_path, {**config(tmp_path), "port": port})
        metrics = run_worker(tmp_path, {**config(tmp_path), "metrics_port": port})
    assert done.returncode == metrics.returncode == 2
    assert f"port: {port} is not allowed" in done.stderr
    assert f"metrics_port: {port} is not allowed" in metrics.stderr


def test_a_wrong_config_is_told_by_field(tmp_path: Path) -> None:
    done = run_worker(tmp_path, {**config(tmp_path), "simulated": {"max_running": 0}, "colour": "red"})
    assert done.returncode == 2
    assert "simulated.max_running" in done.stderr
    assert "colour" in done.stderr
