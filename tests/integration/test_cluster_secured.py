"""A whole cluster with everything that secures it on: mutual TLS on every hop, API keys, tokens, agents, an edge.

Strangers are turned away at every door; certificates, keys and tokens are exchanged while requests run. Simulated
engine; the edge's tokenizer is the built-in model's.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from megatoken.access.channel import presenting
from megatoken.access.credentials import METADATA_KEY
from megatoken.cluster.client.control import shown
from megatoken.errors import AuthError
from megatoken.router.client.client import TokenClient
from megatoken.tls import ClientTls, open_channel
from megatoken.v1 import control_pb2, control_pb2_grpc, router_pb2, router_pb2_grpc, worker_pb2, worker_pb2_grpc
from tests.support.certificates import Authority
from tests.support.clusters import RunningCluster, running

MODEL = "m"


def keys_file(path: Path, *secrets: str) -> Path:
    keys = [{"name": "team", "sha256": hashlib.sha256(secret.encode()).hexdigest()} for secret in secrets]
    path.write_text(json.dumps({"keys": keys}))
    path.chmod(0o600)
    return path


class Secured:
    """The cluster, and who may call it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = Authority(folder)
        self.cert_file, self.key_file = self.authority.issue("node")
        self.keys = keys_file(folder / "keys.json", "key-1")
        self.cluster: RunningCluster

    def spec(self) -> dict[str, Any]:
        tls = {
            "cert_file": str(self.cert_file),
            "key_file": str(self.key_file),
            "ca_file": str(self.authority.ca_file),
            "mutual": True,
        }
        return {
            "cluster": "secured",
            "control": {"port": 0},
            "routers": {"port": 0, "count": 2},
            "edge": {"port": 0},
            "ray": {"cpu_devices": 2},
            "security": {"tls": tls, "api_keys_file": str(self.keys)},
            "models": [
                {
                    "name": MODEL,
                    "engine": "simulated",
                    "source": "builtin:smollm2-135m-instruct",
                    "replicas": 2,
                    "simulated": {"decode_tokens_per_s": 2000, "step_s": 0.02},
                }
            ],
        }

    def tls(self, name: str = "client", *roles: str) -> ClientTls:
        """What a client with a certificate of its own shows."""
        cert, key = self.authority.issue(name, *roles)
        return ClientTls(ca_file=self.authority.ca_file, cert_file=cert, key_file=key)

    def operator_token(self) -> str:
        return self.cluster.run("token").strip()


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    made = Secured(tmp_path_factory.mktemp("secured"))
    directory = made.folder / "cluster"
    directory.mkdir()
    with running(directory, made.spec()) as cluster:
        made.cluster = cluster
        yield made


async def call(address: str, tls: ClientTls | None, token: str, ask: Any) -> grpc.StatusCode:
    present = (lambda: ((METADATA_KEY, token),)) if token else None
    async with presenting(open_channel(address, tls), present) as channel:
        try:
            await ask(channel)
        except grpc.aio.AioRpcError as error:
            return error.code()
    return grpc.StatusCode.OK


async def get_status(channel: Any) -> None:
    await control_pb2_grpc.ControlStub(channel).GetStatus(control_pb2.GetStatusRequest(), timeout=5)


async def shutdown(channel: Any) -> None:
    await control_pb2_grpc.ControlStub(channel).Shutdown(control_pb2.ShutdownRequest(), timeout=5)


async def drain(channel: Any) -> None:
    await worker_pb2_grpc.WorkerStub(channel).Drain(worker_pb2.DrainRequest(), timeout=5)


async def test_every_process_is_up_with_agents_and_the_counts_of_all_agree(secured: Secured) -> None:
    cluster = secured.cluster
    kinds = [process["kind"] for process in cluster.status()["processes"] if process["state"] == "READY"]
    assert sorted(kinds) == ["agent", "edge", "router", "router"]
    async with TokenClient([cluster.address("router")], tls=secured.tls(), api_key="key-1") as client:
        assert len(await client.generate(MODEL, [1, 2, 3], max_tokens=64, ignore_eos=True).tokens()) == 64

    def summed(status: dict[str, Any]) -> bool:
        rows = [row for row in status["throughput"]["rows"] if row["kind"] == "cluster"]
        return any(
            row.get("workers", {}).get("generated_tokens") == row.get("routers", {}).get("generated_tokens") == 64
            for row in rows
        )

    cluster.wait(summed, 20.0)  # the collective's sum, over agents that speak TLS


async def test_a_certificate_of_the_cluster_is_no_permission(secured: Secured) -> None:
    status = secured.cluster.status()
    control, worker = status["controller"], status["replicas"][0]["address"]
    unknown = grpc.StatusCode.UNAUTHENTICATED
    assert await call(control, secured.tls(), "", get_status) is unknown
    assert await call(control, secured.tls(), "", shutdown) is unknown
    assert await call(worker, secured.tls(), "", drain) is unknown
    assert (
        await call(worker, secured.tls("other", "operator"), "", drain) is grpc.StatusCode.PERMISSION_DENIED or unknown
    )
    assert await call(control, None, secured.operator_token(), get_status) is grpc.StatusCode.UNAVAILABLE
    assert await call(control, secured.tls(), secured.operator_token(), get_status) is grpc.StatusCode.OK
    assert await call(control, secured.tls("boss", "operator"), "", get_status) is grpc.StatusCode.OK
    assert await call(worker, secured.tls(), secured.operator_token(), drain) is grpc.StatusCode.PERMISSION_DENIED
    assert len(secured.cluster.ready(MODEL)) == 2, "nobody was drained or shut down"


async def changed(look: Callable[[], bytes], before: bytes, within_s: float = 10.0) -> None:
    """Waits until `look` finds something else."""
    deadline = time.monotonic() + within_s
    while True:
        if await asyncio.to_thread(look) != before:
            return
        assert time.monotonic() < deadline, "what was exchanged is still in force"
        await asyncio.sleep(0.2)


async def test_each_router_is_read_by_itself_with_keys_on(secured: Secured) -> None:
    routers = [process for process in secured.cluster.status()["processes"] if process["kind"] == "router"]
    names = set()
    for router in routers:
        present = shown(secured.operator_token())
        async with presenting(open_channel(router["own_address"], secured.tls()), present) as channel:
            stub = router_pb2_grpc.RouterStub(channel)
            answer = await stub.GetRouterStatus(router_pb2.GetRouterStatusRequest(), timeout=5)
            assert answer.router == router["name"].partition(".")[0]
            names.add(answer.router)
    assert len(names) == 2


class Load:
    """Streams without pause, and what went wrong with them."""

    def __init__(self) -> None:
        self.done, self.failures, self.key = 0, [], "key-1"  # type: ignore[var-annotated]

    async def run(self, router: str, tls: ClientTls) -> None:
        async with TokenClient([router], tls=tls, api_key=self.key) as client:
            while True:
                try:
                    got = await client.generate(MODEL, [1, 2, 3], max_tokens=40, ignore_eos=True).tokens()
                    assert len(got) == 40
                    self.done += 1
                except Exception as error:
                    self.failures.append(repr(error))
                    await asyncio.sleep(0.1)


@contextlib.asynccontextmanager
async def load(secured: Secured, streams: int = 8) -> AsyncIterator[Load]:
    flow, router = Load(), secured.cluster.address("router")
    tasks = [asyncio.create_task(flow.run(router, secured.tls(f"load-{number}"))) for number in range(streams)]
    try:
        yield flow
        before = flow.done
        await asyncio.sleep(3.0)
        assert flow.done > before, "streams stand still"
        assert not flow.failures
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def rescale(secured: Secured) -> None:
    """One replica less, and one more: processes that start and connect now."""
    for wanted in (1, 2):
        await asyncio.to_thread(secured.cluster.run, "scale", f"{MODEL}={wanted}", "--wait", timeout_s=60.0)


async def test_tokens_are_rotated_under_load_and_no_request_is_lost(secured: Secured) -> None:
    old = secured.operator_token()
    async with load(secured):
        await asyncio.to_thread(secured.cluster.run, "token", "--rotate")
        new = secured.operator_token()
        assert new != old
        control = secured.cluster.status()["controller"]
        assert await call(control, secured.tls(), new, get_status) is grpc.StatusCode.OK
        assert await call(control, secured.tls(), old, get_status) is grpc.StatusCode.OK, "for a minute more"
        await rescale(secured)


async def test_certificates_are_exchanged_under_load_and_no_stream_is_lost(secured: Secured) -> None:
    def certificate() -> bytes:
        host, _, port = secured.cluster.address("edge").rpartition(":")
        context = ssl.create_default_context(cafile=str(secured.authority.ca_file))
        cert, key = secured.authority.issue("looker")
        context.load_cert_chain(cert, key)
        context.check_hostname = False
        with socket.create_connection((host, int(port)), 5) as plain, context.wrap_socket(plain) as wrapped:
            return wrapped.getpeercert(binary_form=True) or b""

    before = await asyncio.to_thread(certificate)
    async with load(secured):
        secured.key_file.unlink()
        await asyncio.sleep(0.1)
        secured.authority.issue("node")  # a new key and a new certificate in the same files
        await changed(certificate, before)
        await rescale(secured)  # new connections on every hop
    assert secured.cluster.status()["throughput"]["complete"]


async def test_keys_are_exchanged_while_clients_go_on(secured: Secured) -> None:
    router = secured.cluster.address("router")
    keys_file(secured.keys, "key-1", "key-2")
    deadline = time.monotonic() + 10
    async with load(secured), TokenClient([router], tls=secured.tls(), api_key="key-2") as client:
        while True:
            try:
                await client.generate(MODEL, [1, 2], max_tokens=4).tokens()
                break
            except AuthError:
                assert time.monotonic() < deadline, "the new key is not known"
                await asyncio.sleep(0.2)
    async with TokenClient([router], tls=secured.tls(), api_key="key-3") as client:
        with pytest.raises(AuthError):
            await client.generate(MODEL, [1, 2], max_tokens=4).tokens()


def test_the_edge_asks_for_a_key_too(secured: Secured) -> None:
    context = ssl.create_default_context(cafile=str(secured.authority.ca_file))
    cert, key = secured.authority.issue("http")
    context.load_cert_chain(cert, key)
    url = f"https://{secured.cluster.address('edge')}/v1/models"
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(url, context=context, timeout=10)
    assert refused.value.code == 401
    request = urllib.request.Request(url, headers={"Authorization": "Bearer key-1"})
    with urllib.request.urlopen(request, context=context, timeout=10) as answer:
        assert json.load(answer)["data"][0]["id"] == MODEL
