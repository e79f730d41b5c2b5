"""Routers and workers as real processes, the simulated engine behind them."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from megatoken.counters import NAMES, read_counters
from megatoken.errors import AuthError, MegatokenError, OverloadError, RequestError, UnavailableError
from megatoken.router.client.client import TokenClient
from megatoken.tls import ClientTls
from megatoken.v1 import router_pb2, router_pb2_grpc, tokens_pb2, tokens_pb2_grpc
from tests.support.certificates import Authority
from tests.support.processes import Processes, Started

MODEL = "simulated"
PROMPT = list(range(10, 42))


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    with Processes(tmp_path) as started:
        yield started


def start_worker(processes: Processes, name: str, **simulated: Any) -> Started:
    settings = {"decode_tokens_per_s": 20_000, "max_running": 64, "max_model_len": 4096, **simulated}
    config = {
        "replica": name,
        "model": MODEL,
        "engine": "simulated",
        "counters_dir": str(processes.directory / "counters"),
        "metrics_port": None,
        "simulated": settings,
    }
    return processes.start("worker", config)


def member(worker: Started) -> dict[str, Any]:
    ready = worker.ready
    return {
        "replica": ready["replica"],
        "model": MODEL,
        "address": ready["address"],
        "incarnation": str(ready["incarnation"]),
        "phase": "REPLICA_PHASE_READY",
        "max_model_len": ready["max_model_len"],
        "vocab_size": ready["vocab_size"],
        "max_running": ready["max_running"],
        "block_size": ready["block_size"],
        "engine": ready["engine"],
    }


def snapshot(*workers: Started) -> dict[str, Any]:
    return {
        "epoch": "1",
        "version": "1",
        "replicas": [member(worker) for worker in workers],
        "models": [{"model": MODEL, "replicas_wanted": len(workers)}],
    }


def start_router(processes: Processes, *workers: Started, **settings: Any) -> Started:
    config = {
        "router": f"r{len(processes.started)}",
        "static_snapshot": snapshot(*workers),
        "counters_dir": str(processes.directory / "counters"),
        **settings,
    }
    return processes.start("router", config)


async def ready(client: TokenClient, replicas: int) -> None:
    """Until the router has sessions to so many replicas."""
    async with asyncio.timeout(60):
        while not any(model.ready_replicas >= replicas for model in await client.models()):  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_tokens_stream_through_router_and_worker(processes: Processes) -> None:
    worker = start_worker(processes, "w0")
    router = start_router(processes, worker)
    async with TokenClient([router.address]) as client:
        await ready(client, 1)
        stream = client.generate(MODEL, PROMPT, max_tokens=20, temperature=0.0)
        tokens = await stream.tokens()
        assert len(tokens) == 20
        assert stream.finish is not None
        assert (stream.finish.prompt_tokens, stream.finish.generated_tokens) == (32, 20)
        assert stream.finish.replica == "w0"
        streams = [client.generate(MODEL, PROMPT, max_tokens=50, temperature=0.0) for _ in range(100)]
        answers = await asyncio.gather(*(s.tokens() for s in streams))
        assert all(answer[:20] == tokens and len(answer) == 50 for answer in answers)


@pytest.mark.parametrize(
    ("model", "prompt", "fields", "complaint"),
    [
        ("nobody", PROMPT, {}, "model: 'nobody' is not allowed; one of: simulated"),
        (MODEL, [], {}, "prompt: "),
        (MODEL, [1 << 20], {}, "vocabulary"),
        (MODEL, PROMPT, {"max_tokens": 5000}, "max_tokens: 5000"),
        (MODEL, PROMPT, {"temperature": -1.0}, "temperature: -1.0"),
    ],
)
async def test_a_wrong_request_is_told_what_is_wrong(
    processes: Processes, model: str, prompt: list[int], fields: dict[str, Any], complaint: str
) -> None:
    worker = start_worker(processes, "w0")
    router = start_router(processes, worker)
    async with TokenClient([router.address]) as client:
        await ready(client, 1)
        with pytest.raises(RequestError) as caught:
            await client.generate(model, prompt, **fields).tokens()
        assert complaint in str(caught.value)


async def test_kill_9_of_a_worker_is_not_seen_by_any_stream(processes: Processes) -> None:
    workers = [start_worker(processes, f"w{i}", decode_tokens_per_s=6400) for i in range(2)]
    router = start_router(processes, *workers)
    async with TokenClient([router.address]) as client:
        await ready(client, 2)

        async def run() -> list[list[int]]:
            streams = [client.generate(MODEL, [*PROMPT, i], max_tokens=200, temperature=0.0) for i in range(64)]
            return await asyncio.gather(*(stream.tokens() for stream in streams))

        undisturbed = await run()
        disturbed = asyncio.create_task(run())
        await asyncio.sleep(0.5)
        workers[0].kill()
        assert await disturbed == undisturbed


async def test_cancelling_a_stream_frees_it_everywhere(processes: Processes) -> None:
    worker = start_worker(processes, "w0", decode_tokens_per_s=640)
    router = start_router(processes, worker)
    async with TokenClient([router.address]) as client:
        await ready(client, 1)
        stream = client.generate(MODEL, PROMPT, max_tokens=4000, temperature=0.0)
        async for _ in stream:
            break
        other = client.generate(MODEL, PROMPT, max_tokens=3, temperature=0.0)
        assert len(await other.tokens()) == 3
        with pytest.raises(MegatokenError):
            await client.generate("nobody", PROMPT).tokens()


async def test_n_choices_stream_side_by_side(processes: Processes) -> None:
    worker = start_worker(processes, "w0")
    router = start_router(processes, worker)
    async with TokenClient([router.address]) as client:
        await ready(client, 1)
        stream = client.generate(MODEL, PROMPT, max_tokens=9, n=4, temperature=1.0, seed=3)
        found: dict[int, int] = {}
        async for delta in stream:
            found[delta.choice] = found.get(delta.choice, 0) + len(delta.tokens)
        assert found == {0: 9, 1: 9, 2: 9, 3: 9}
        assert sorted(stream.finishes) == [0, 1, 2, 3]


async def test_generate_streams_and_refuses_by_status(processes: Processes) -> None:
    worker = start_worker(processes, "w0")
    router = start_router(processes, worker)
    async with TokenClient([router.address]) as client:
        await ready(client, 1)
    async with grpc.aio.insecure_channel(router.address) as channel:
        stub = tokens_pb2_grpc.TokensStub(channel)
        request = tokens_pb2.GenerateRequest(model=MODEL, prompt=PROMPT)
        request.sampling.max_tokens = 12
        messages = [message async for message in stub.Generate(request, timeout=20)]
        assert sum(len(message.tokens) for message in messages) == 12
        assert messages[-1].finish.reason == tokens_pb2.FINISH_REASON_LENGTH
        assert not any(message.HasField("finish") for message in messages[:-1])
        request.model = "nobody"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            _ = [message async for message in stub.Generate(request, timeout=20)]
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_held_tokens_are_passed_on_when_their_delay_is_over(processes: Processes) -> None:
    """Also by a router that had nothing held before: nobody looks while nobody asks for it."""
    router = start_router(processes, start_worker(processes, "w0", step_s=0.1))
    request = tokens_pb2.GenerateRequest(
        model=MODEL, prompt=PROMPT, delivery=tokens_pb2.DELIVERY_COALESCE, max_delay_ms=250
    )
    request.sampling.max_tokens = 30
    async with TokenClient([router.address]) as client:
        await ready(client, 1)
    async with grpc.aio.insecure_channel(router.address) as channel:
        call = tokens_pb2_grpc.TokensStub(channel).Generate(request, timeout=30)  # type: ignore[no-untyped-call]
        sizes = [len(answer.tokens) async for answer in call]
    assert sum(sizes) == 30
    assert len(sizes) > 5, "three seconds of tokens, a quarter of a second at a time"
    assert max(sizes) < 15


async def test_a_hung_worker_s_streams_go_on_elsewhere(processes: Processes) -> None:
    hanging = start_worker(processes, "w0", decode_tokens_per_s=6400, faults=[{"kind": "hang", "after_tokens": 900}])
    healthy = start_worker(processes, "w1", decode_tokens_per_s=6400)
    router = start_router(processes, hanging, healthy, resume={"hang_s": 5.0, "max_resumes": 50})
    async with TokenClient([router.address]) as client:
        await ready(client, 2)
        streams = [client.generate(MODEL, [*PROMPT, i], max_tokens=100, temperature=0.0) for i in range(32)]
        answers = await asyncio.gather(*(stream.tokens() for stream in streams))
        again = [client.generate(MODEL, [*PROMPT, i], max_tokens=100, temperature=0.0) for i in range(32)]
        assert await asyncio.gather(*(stream.tokens() for stream in again)) == answers
        assert sum(stream.finish.resumes for stream in streams if stream.finish) > 0


async def test_a_client_that_reads_nothing_delays_nobody(processes: Processes) -> None:
    worker = start_worker(processes, "w0", decode_tokens_per_s=50_000, max_running=256)
    router = start_router(processes, worker)
    async with TokenClient([router.address]) as client:
        await ready(client, 1)
        async with grpc.aio.insecure_channel(router.address) as channel:
            lazy = tokens_pb2_grpc.TokensStub(channel).Session()
            starts = [
                tokens_pb2.Start(
                    stream=i + 1,
                    request=tokens_pb2.GenerateRequest(
                        model=MODEL, prompt=PROMPT, sampling=tokens_pb2.SamplingParams(max_tokens=4000)
                    ),
                )
                for i in range(100)
            ]
            await lazy.write(tokens_pb2.ClientFrame(start=starts))
            began = asyncio.get_running_loop().time()
            for _ in range(10):
                assert len(await client.generate(MODEL, PROMPT, max_tokens=20, temperature=0.0).tokens()) == 20
            assert asyncio.get_running_loop().time() - began < 20
            lazy.cancel()
        async with asyncio.timeout(60):
            while (await status(router)).running:  # noqa: ASYNC110
                await asyncio.sleep(0.05)


async def test_overload_is_refused_with_retry_after_and_what_runs_is_unharmed(processes: Processes) -> None:
    worker = start_worker(processes, "w0", decode_tokens_per_s=2000, max_running=8)
    router = start_router(processes, worker, admission={"max_queued_requests": 8})
    async with TokenClient([router.address]) as client:
        await ready(client, 1)
        streams = [client.generate(MODEL, PROMPT, max_tokens=50, temperature=0.0) for _ in range(60)]
        answers = await asyncio.gather(*(stream.tokens() for stream in streams), return_exceptions=True)
        refused = [answer for answer in answers if isinstance(answer, OverloadError)]
        served = [answer for answer in answers if isinstance(answer, list)]
        assert len(refused) + len(served) == 60
        assert len(served) >= 16
        assert {len(answer) for answer in served} == {50}
        assert refused
        assert all(error.retry_after_s > 0 for error in refused)


async def test_a_new_router_takes_the_port_over_while_the_old_one_drains(processes: Processes) -> None:
    worker = start_worker(processes, "w0", decode_tokens_per_s=800, max_running=32)
    old = start_router(processes, worker, reuse_port=True)
    port = int(old.address.rpartition(":")[2])
    async with TokenClient([old.address]) as client:
        await ready(client, 1)
        long = client.generate(MODEL, PROMPT, max_tokens=100, temperature=0.0)
        first = await anext(aiter(long))
        new = start_router(processes, worker, reuse_port=True, port=port)
        old.process.terminate()
        async with asyncio.timeout(60):
            while old.process.poll() is None:
                with contextlib.suppress(grpc.aio.AioRpcError):  # a closing listener resets what waits at its port
                    if (await status(old)).draining:
                        break
                await asyncio.sleep(0.02)
        answers = await asyncio.gather(
            *(client.generate(MODEL, PROMPT, max_tokens=5, temperature=0.0).tokens() for _ in range(20))
        )
        assert {len(answer) for answer in answers} == {5}
        del first
    assert await asyncio.to_thread(old.process.wait, 60) == 0
    assert new.process.poll() is None


async def test_counters_agree_with_what_the_worker_made(processes: Processes) -> None:
    worker = start_worker(processes, "w0")
    router = start_router(processes, worker)
    async with TokenClient([router.address]) as client:
        await ready(client, 1)
        streams = [client.generate(MODEL, PROMPT, max_tokens=30, temperature=0.0) for _ in range(20)]
        await asyncio.gather(*(stream.tokens() for stream in streams))
    files = {read_counters(path)[0]["kind"]: path for path in (processes.directory / "counters").iterdir()}
    made, given = (dict(zip(NAMES, read_counters(files[kind])[1], strict=True)) for kind in ("worker", "router"))
    assert given["generated_tokens"] == made["generated_tokens"] == 600
    assert given["prompt_tokens"] == made["prompt_tokens"]
    assert (await status(router)).generated_tokens == 600


async def status(router: Started) -> router_pb2.RouterStatus:
    async with grpc.aio.insecure_channel(router.address) as channel:
        stub = router_pb2_grpc.RouterStub(channel)
        answer: router_pb2.RouterStatus = await stub.GetRouterStatus(router_pb2.GetRouterStatusRequest(), timeout=10)
        return answer


async def test_mutual_tls_and_keys_hold_the_door(processes: Processes, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    cert_file, key_file = authority.issue("router")
    keys = tmp_path / "keys.json"
    digest = hashlib.sha256(b"opensesame").hexdigest()
    keys.write_text(json.dumps({"keys": [{"name": "team", "sha256": digest, "concurrency": 2}]}))
    worker = start_worker(processes, "w0")
    tls = {"cert_file": str(cert_file), "key_file": str(key_file), "client_ca_file": str(authority.ca_file)}
    router = start_router(processes, worker, tls=tls, api_keys_file=str(keys))
    mine = ClientTls(ca_file=authority.ca_file, cert_file=cert_file, key_file=key_file)
    async with TokenClient([router.address], tls=mine, api_key="opensesame") as client:
        await ready(client, 1)
        assert len(await client.generate(MODEL, PROMPT, max_tokens=5).tokens()) == 5
        long = [client.generate(MODEL, PROMPT, max_tokens=3000) for _ in range(3)]
        with pytest.raises(OverloadError, match="key 'team' has 2 requests at once"):
            await long[2].tokens()
    for _ in range(40):  # a write that crosses the refusal must not hide it
        async with TokenClient([router.address], tls=mine, api_key="guess", connect_timeout_s=5) as stranger:
            with pytest.raises(AuthError, match="not known"):
                await stranger.generate(MODEL, PROMPT, max_tokens=1).tokens()
    bare = ClientTls(ca_file=authority.ca_file)
    with pytest.raises(UnavailableError):
        await TokenClient([router.address], tls=bare, api_key="opensesame", connect_timeout_s=2).connect()
    assert "opensesame" not in router.output()


async def test_a_leased_replica_is_used_directly(processes: Processes) -> None:
    worker = start_worker(processes, "w0")
    router = start_router(processes, worker)
    async with TokenClient([router.address]) as client:
        await ready(client, 1)
    async with grpc.aio.insecure_channel(router.address) as channel:
        stub = router_pb2_grpc.RouterStub(channel)
        ask = router_pb2.AssignRequest(model=MODEL, prompt_tokens=len(PROMPT), max_tokens=8)
        lease = await stub.Assign(ask, timeout=10)
        assert (lease.replica, lease.address) == ("w0", worker.address)
        async with TokenClient([lease.address]) as direct:
            stream = direct.generate(MODEL, PROMPT, max_tokens=8, lease=lease)
            assert len(await stream.tokens()) == 8
        await stub.Release(router_pb2.ReleaseRequest(lease=lease.lease, generated_tokens=8), timeout=10)
        assert (await status(router)).replicas[0].outstanding_tokens == 0


async def test_nonsense_on_a_session_ends_that_session_alone(processes: Processes) -> None:
    worker = start_worker(processes, "w0")
    router = start_router(processes, worker)
    async with TokenClient([router.address]) as client:
        await ready(client, 1)
        async with grpc.aio.insecure_channel(router.address) as channel:
            call = channel.stream_stream("/megatoken.v1.Tokens/Session")()
            await call.write(b"\xff\xff\xff")
            assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert len(await client.generate(MODEL, PROMPT, max_tokens=5).tokens()) == 5


async def test_health_tells_live_ready_and_deep_apart(processes: Processes) -> None:
    worker = start_worker(processes, "w0")
    router = start_router(processes, worker)
    async with TokenClient([router.address]) as client:
        await ready(client, 1)
    async with grpc.aio.insecure_channel(router.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)

        async def ask(name: str) -> int:
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=30)
            return int(answer.status)

        serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
        assert [await ask(name) for name in ("live", "ready", "", "deep")] == [serving] * 4
        assert (await status(router)).replicas[0].in_flight == 0
        worker.kill()
        await asyncio.sleep(2.5)  # a deep answer is good for two seconds
        assert [await ask(name) for name in ("live", "ready", "deep")] == [serving, serving, not_serving]
