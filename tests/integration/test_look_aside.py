"""Guarded workers behind a guarded router, as real processes: who may stream from a worker straight, and its price."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from megatoken.access.credentials import ClusterSecrets, dump, new_secrets
from megatoken.access.files import write_private
from megatoken.access.table import Identity, Program
from megatoken.errors import AuthError, NotFoundError, UnavailableError
from megatoken.router.client.client import TokenClient
from megatoken.router.client.leases import LeaseClient
from megatoken.tokens.frames import pack
from megatoken.v1 import frame_columns_pb2, router_pb2, router_pb2_grpc, tokens_pb2
from tests.support.processes import Processes, Started
from tests.support.worker_client import TestSession

MODEL = "simulated"
PROMPT = list(range(10, 42))
GENERATE = "/megatoken.v1.Tokens/Generate"
BIG, SMALL = "a key without limits", "a key with few tokens"


class Site:
    """A router and its workers, all of one cluster's secrets."""

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.folder = processes.directory
        self.secrets: ClusterSecrets = new_secrets()

    def credentials(self, name: str, own: Identity, program: Program) -> str:
        path = self.folder / f"{name}.credentials"
        write_private(path, dump(self.secrets.credentials(own, program, name)))
        return str(path)

    def worker(self, name: str, **simulated: Any) -> Started:
        config = {
            "replica": name,
            "model": MODEL,
            "engine": "simulated",
            "counters_dir": str(self.folder / "counters"),
            "metrics_port": None,
            "credentials_file": self.credentials(name, Identity.WORKER, Program.WORKER),
            "simulated": {"decode_tokens_per_s": 20_000, "max_running": 64, "max_model_len": 4096, **simulated},
        }
        return self.processes.start("worker", config)

    def router(self, *workers: Started, ttl_s: float = 60.0) -> Started:
        keys = self.folder / "keys.json"
        entries = [
            {"name": "big", "sha256": hashlib.sha256(BIG.encode()).hexdigest()},
            {"name": "small", "sha256": hashlib.sha256(SMALL.encode()).hexdigest(), "tokens_per_minute": 1000},
        ]
        write_private(keys, json.dumps({"keys": entries}))
        facts = ("replica", "address", "max_model_len", "vocab_size", "max_running", "block_size", "engine")
        replicas = [
            {
                **{name: worker.ready[name] for name in facts},
                "model": MODEL,
                "incarnation": str(worker.ready["incarnation"]),
                "phase": "REPLICA_PHASE_READY",
            }
            for worker in workers
        ]
        models = [{"model": MODEL, "replicas_wanted": len(workers)}]
        config = {
            "router": "r0",
            "static_snapshot": {"epoch": "1", "version": "1", "replicas": replicas, "models": models},
            "counters_dir": str(self.folder / "counters"),
            "credentials_file": self.credentials("r0", Identity.ROUTER, Program.ROUTER),
            "api_keys_file": str(keys),
            "leases": {"ttl_s": ttl_s},
        }
        return self.processes.start("router", config)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with Processes(tmp_path) as processes:
        yield Site(processes)


async def ready(router: Started, replicas: int = 1) -> None:
    async with TokenClient([router.address], api_key=BIG) as client, asyncio.timeout(60):
        while not any(model.ready_replicas >= replicas for model in await client.models()):  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def assign(
    channel: Any, key: str = BIG, max_tokens: int = 8, prompt_tokens: int = len(PROMPT)
) -> router_pb2.AssignResponse:
    ask = router_pb2.AssignRequest(model=MODEL, prompt_tokens=prompt_tokens, max_tokens=max_tokens)
    metadata = (("authorization", f"Bearer {key}"),)
    answer: router_pb2.AssignResponse = await router_pb2_grpc.RouterStub(channel).Assign(
        ask, timeout=10, metadata=metadata
    )
    return answer


def request(lease: str = "", request_id: str = "", prompt: list[int] = PROMPT, **sampling: Any) -> Any:
    return frame_columns_pb2.GenerateRequest(
        model=MODEL,
        prompt=pack(prompt),
        lease=lease,
        request_id=request_id,
        sampling=tokens_pb2.SamplingParams(**{"max_tokens": 8, **sampling}),
    )


async def straight(address: str, message: Any) -> tuple[grpc.StatusCode, str, int]:
    """A Generate call to a worker: (status, its message, tokens)."""
    async with grpc.aio.insecure_channel(address) as channel:
        call = channel.unary_stream(
            GENERATE,
            request_serializer=frame_columns_pb2.GenerateRequest.SerializeToString,
            response_deserializer=frame_columns_pb2.GenerateResponse.FromString,
        )(message, timeout=20)
        tokens = 0
        try:
            async for response in call:
                tokens += len(response.tokens) // 4
        except grpc.aio.AioRpcError as error:
            return error.code(), str(error.details()), tokens
        return grpc.StatusCode.OK, "", tokens


async def test_only_a_lease_opens_a_worker_to_a_client_and_only_once(site: Site) -> None:
    unknown, denied = grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED
    workers = [site.worker("w0"), site.worker("w1")]
    router = site.router(*workers)
    await ready(router, 2)
    addresses = {worker.ready["replica"]: worker.address for worker in workers}
    async with TokenClient([router.address], api_key=BIG) as client:  # the router itself passes
        assert len(await client.generate(MODEL, PROMPT, max_tokens=8).tokens()) == 8
    async with grpc.aio.insecure_channel(router.address) as channel:
        lease = await assign(channel)
        good = request(lease.lease, lease.request_id)
        other = next(address for replica, address in addresses.items() if replica != lease.replica)
        forged = lease.lease.replace(",32,8,", ",32,9,")
        for address, message, code, why in [
            (lease.address, request(), unknown, "needs one, from a router's Assign"),
            (lease.address, request("made up", lease.request_id), unknown, "not one that a router signed"),
            (lease.address, request(forged, lease.request_id), unknown, "its signature is wrong"),
            (other, good, denied, f"it is for replica '{lease.replica}'"),
            (lease.address, request(lease.lease, "another"), denied, "and this is 'another'"),
            (lease.address, request(lease.lease, lease.request_id, max_tokens=9), denied, "the lease allows 8"),
            (lease.address, request(lease.lease, lease.request_id, [*PROMPT, 1]), denied, "the lease allows 32"),
        ]:
            got, said, tokens = await straight(address, message)
            assert (got, why in said, tokens) == (code, True, 0), said
        assert await straight(lease.address, good) == (grpc.StatusCode.OK, "", 8)
        got, said, _ = await straight(lease.address, good)
        assert (got, "used already" in said) == (denied, True), said

        # On a session each refusal is a request's own, and the others run.
        lease = await assign(channel)
        async with (
            grpc.aio.insecure_channel(lease.address) as direct,
            TestSession(direct) as session,
        ):
            message = request(lease.lease, lease.request_id)
            await session.start({1: request(), 2: message, 3: message})
            await session.until(1, 2, 3)
            codes = {number: finish.code for number, finish in session.finishes.items()}
            assert codes == {1: unknown.value[0], 2: 0, 3: denied.value[0]}
            assert (len(session.tokens[2]), session.loads) == (8, [])  # and it is told nothing that is for routers

        lease = await assign(channel)  # as the client library does it
        async with TokenClient([lease.address]) as client:
            assert len(await client.generate(MODEL, PROMPT, max_tokens=8, lease=lease).tokens()) == 8
            with pytest.raises(AuthError, match="needs one"):
                await client.generate(MODEL, PROMPT, max_tokens=8).tokens()


async def test_a_lease_is_over_at_its_end_and_so_is_its_stream(site: Site) -> None:
    worker = site.worker("w0", decode_tokens_per_s=64, max_running=16)  # 4 tokens a second each
    router = site.router(worker, ttl_s=3.0)
    await ready(router)
    async with grpc.aio.insecure_channel(router.address) as channel:
        unused, lease = await assign(channel), await assign(channel, max_tokens=1000)  # that ends after the other
        code, said, tokens = await straight(
            lease.address, request(lease.lease, lease.request_id, max_tokens=1000, ignore_eos=True)
        )
        assert (code, said) == (grpc.StatusCode.DEADLINE_EXCEEDED, "lease: it ended while its request ran")
        assert 0 < tokens < 20
        code, said, _ = await straight(unused.address, request(unused.lease, unused.request_id))
        assert (code, "lease: it ended" in said) == (grpc.StatusCode.PERMISSION_DENIED, True), said


async def test_a_lease_ends_with_its_replica(site: Site) -> None:
    worker = site.worker("w0")
    router = site.router(worker)
    await ready(router)
    async with grpc.aio.insecure_channel(router.address) as channel:
        lease = await assign(channel)
    worker.kill()
    message = request(lease.lease, lease.request_id)
    for name, why in [
        ("w1", "it is for replica 'w0', and this is 'w1'"),
        ("w0", "another incarnation of replica 'w0'"),
    ]:
        replacement = site.worker(name)
        code, said, _ = await straight(replacement.address, message)
        assert (code, why in said) == (grpc.StatusCode.PERMISSION_DENIED, True), said


async def test_the_worker_says_what_a_lease_used_and_its_client_does_not(site: Site) -> None:
    worker = site.worker("w0")
    router = site.router(worker)
    await ready(router)
    async with grpc.aio.insecure_channel(router.address) as channel:
        lease = await assign(channel, SMALL, max_tokens=800)
        release = router_pb2.ReleaseRequest(lease=lease.lease, generated_tokens=0)
        metadata = (("authorization", f"Bearer {SMALL}"),)
        await router_pb2_grpc.RouterStub(channel).Release(release, timeout=10, metadata=metadata)
        with pytest.raises(grpc.aio.AioRpcError, match="1000 tokens a minute"):
            await assign(channel, SMALL, prompt_tokens=900)
        assert await straight(lease.address, request(lease.lease, lease.request_id)) == (grpc.StatusCode.OK, "", 8)
        async with asyncio.timeout(10):  # less than the key needs to refill by itself
            while True:
                try:
                    await assign(channel, SMALL, prompt_tokens=900)
                    break
                except grpc.aio.AioRpcError:
                    await asyncio.sleep(0.05)


async def test_many_leases_over_one_call_are_each_answered_and_released(site: Site) -> None:
    worker = site.worker("w0")
    router = site.router(worker)
    await ready(router)
    ask = router_pb2.AssignRequest(model=MODEL, prompt_tokens=len(PROMPT), max_tokens=8)
    unknown = router_pb2.AssignRequest(model="nobody", prompt_tokens=1, max_tokens=1)
    async with LeaseClient(router.address, api_key=BIG) as leases, TokenClient([worker.address]) as direct:
        answers = await asyncio.gather(
            *(leases.assign(unknown if number == 7 else ask) for number in range(20)), return_exceptions=True
        )
        (refused,) = [answer for answer in answers if not isinstance(answer, router_pb2.AssignResponse)]
        assert isinstance(refused, NotFoundError)
        assert "'nobody'" in str(refused)
        assert refused is answers[7], "each has the answer to its own"
        granted = [answer for answer in answers if isinstance(answer, router_pb2.AssignResponse)]
        assert len({lease.lease for lease in granted}) == 19
        lease = granted.pop()
        assert len(await direct.generate(MODEL, PROMPT, max_tokens=8, lease=lease).tokens()) == 8
        for lease in granted:
            leases.release(lease, failed=True)
    async with httpx.AsyncClient() as http:
        lines = (await http.get(f"http://{router.ready['metrics_address']}/metrics")).text.splitlines()
    assert "megatoken_router_leases 0.0" in lines
    assert 'megatoken_router_leases_ended_total{outcome="failed"} 18.0' in lines


async def test_a_lease_call_without_a_key_or_with_too_much_is_refused_and_a_lost_one_says_so(site: Site) -> None:
    router = site.router(site.worker("w0"))
    await ready(router)
    ask = router_pb2.AssignRequest(model=MODEL, prompt_tokens=1, max_tokens=1)
    async with LeaseClient(router.address) as leases:
        with pytest.raises(AuthError, match="API key"):
            await leases.assign(ask)
    async with grpc.aio.insecure_channel(router.address) as channel:
        call = router_pb2_grpc.RouterStub(channel).Leases(metadata=(("authorization", f"Bearer {BIG}"),))
        await call.write(router_pb2.LeasesRequest(assign=[ask] * 4097))
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "assign: 4097 is not allowed; at most 4096" in (await call.details() or "")
    async with LeaseClient(router.address, api_key=BIG) as leases:
        await leases.assign(ask)
        router.kill()
        with pytest.raises(UnavailableError):
            await leases.assign(ask)
