"""Keys, credentials and certificates exchanged, missing, broken and public while requests run: no stream is lost.

A real router and a real worker with the simulated engine, mutual TLS, an API keys file and credentials. Clients that
stay and clients that come anew stream all the time. Each file is spoilt in each way, then put right, and in the end
exchanged: what was good last stays in force, and what is good now comes into force. The edge's files are exchanged by
tests/integration/test_cluster_secured.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Final

from megatoken.access.credentials import dump, new_secrets
from megatoken.access.files import write_private
from megatoken.access.table import Identity, Program
from megatoken.errors import AuthError, MegatokenError
from megatoken.router.client.client import TokenClient
from megatoken.tls import ClientTls
from tests.chaos.outcome import Outcome
from tests.support.certificates import Authority
from tests.support.processes import Processes, Started

NAME = "rotation"
ABOUT = "keys, credentials and certificates exchanged, missing, broken and public under load"

MODEL, TOKENS, STREAMS = "m", 24, 4
AWAY_S: Final = 0.1
IN_FORCE_S: Final = 5.0  # files are looked at once a second, certificates at each handshake
SETTLE_S: Final = 1.2  # past the second in which a spoilt file would come into force


class Files:
    """Everything that is exchanged, and the processes that read it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.authority, self.secrets = folder, Authority(folder), new_secrets()
        self.cert, self.key = self.authority.issue("server", "router", "worker", "controller")
        self.keys, self.router, self.worker = (folder / name for name in ("keys.json", "router.cred", "worker.cred"))
        self.put_keys("key-1")
        self.put_credentials()

    def put_keys(self, *secrets: str) -> None:
        entries = [{"name": "team", "sha256": hashlib.sha256(secret.encode()).hexdigest()} for secret in secrets]
        write_private(self.keys, json.dumps({"keys": entries}))

    def put_credentials(self) -> None:
        write_private(self.worker, dump(self.secrets.credentials(Identity.WORKER, Program.WORKER, "m-1")))
        write_private(self.router, dump(self.secrets.credentials(Identity.ROUTER, Program.ROUTER)))

    def client(self, name: str) -> ClientTls:
        cert, key = self.authority.issue(name)
        return ClientTls(ca_file=self.authority.ca_file, cert_file=cert, key_file=key)

    def start(self, processes: Processes) -> tuple[Started, Started]:
        tls = {"cert_file": str(self.cert), "key_file": str(self.key)}
        authority = str(self.authority.ca_file)
        common = {"metrics_port": None, "counters_dir": str(self.folder / "counters")}
        engine = {"engine": "simulated", "simulated": {"decode_tokens_per_s": 4000, "step_s": 0.01}}
        own = {
            "replica": "m-1",
            "model": MODEL,
            "tls": {**tls, "client_ca_file": authority},
            "credentials_file": str(self.worker),
        }
        worker = processes.start("worker", common | engine | own)
        member = {
            "replica": "m-1",
            "model": MODEL,
            "address": worker.address,
            "incarnation": str(worker.ready["incarnation"]),
            "phase": "REPLICA_PHASE_READY",
            "max_model_len": worker.ready["max_model_len"],
            "max_running": worker.ready["max_running"],
        }
        doors = {"tls": {**tls, "client_ca_file": authority}, "worker_tls": {**tls, "ca_file": authority}}
        models = [{"model": MODEL, "replicasWanted": 1, "replicasReady": 1}]
        router = processes.start(
            "router",
            common
            | doors
            | {"router": "r", "api_keys_file": str(self.keys), "credentials_file": str(self.router)}
            | {"static_snapshot": {"epoch": "1", "version": "1", "replicas": [member], "models": models}},
        )
        return router, worker


class Load:
    """Clients that stay, and one that comes anew for each request."""

    def __init__(self, files: Files, router: str, outcome: Outcome) -> None:
        self.files, self.router, self.outcome, self.api_key = files, router, outcome, "key-1"
        self.done = 0

    async def stay(self, number: int) -> None:
        async with TokenClient([self.router], tls=self.files.client(f"stays-{number}"), api_key=self.api_key) as client:
            while True:
                await self.ask(client)

    async def come(self) -> None:
        tls = self.files.client("comes")
        while True:
            async with TokenClient([self.router], tls=tls, api_key=self.api_key) as client:
                await self.ask(client)
            await asyncio.sleep(0.05)

    async def ask(self, client: TokenClient) -> None:
        self.outcome.requests += 1
        try:
            got = await client.generate(MODEL, [5, 6, 7], max_tokens=TOKENS, ignore_eos=True, temperature=0.0).tokens()
        except MegatokenError as error:
            self.outcome.lost += 1
            self.outcome.problem(f"a request failed: {type(error).__name__}: {error}")
            await asyncio.sleep(0.2)
            return
        self.done += 1
        if len(got) != TOKENS:
            self.outcome.wrong += 1
            self.outcome.problem(f"{len(got)} tokens of {TOKENS}")

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(self.stay(number)) for number in range(STREAMS)]
        tasks.append(asyncio.create_task(self.come()))
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def missing(path: Path, good: bytes) -> None:
    path.unlink()
    await asyncio.sleep(AWAY_S)
    _put(path, good)


async def half(path: Path, good: bytes) -> None:
    _put(path, good[: len(good) // 2])
    await asyncio.sleep(SETTLE_S)
    _put(path, good)


async def empty(path: Path, good: bytes) -> None:
    _put(path, b"")
    await asyncio.sleep(SETTLE_S)
    _put(path, good)


async def other(path: Path, good: bytes) -> None:
    """Of another kind, or with fields of a newer version: JSON with a field more, a key that fits no certificate."""
    try:
        newer = json.dumps({**json.loads(good), "of_a_newer_version": 1}).encode()
    except ValueError:
        newer = good[::-1]
    _put(path, newer)
    await asyncio.sleep(SETTLE_S)
    _put(path, good)


async def public(path: Path, good: bytes) -> None:
    """Others may read it; only for secrets."""
    path.chmod(0o644)
    path.touch()
    await asyncio.sleep(SETTLE_S)
    path.chmod(0o600)


SPOILS: Final[dict[str, Callable[[Path, bytes], Awaitable[None]]]] = {
    "missing": missing,
    "half written": half,
    "empty": empty,
    "of another kind": other,
    "readable by others": public,
}


def _put(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    path.chmod(0o600)


async def run(scale: float) -> Outcome:
    outcome = Outcome(simulated=True)
    with tempfile.TemporaryDirectory(prefix="mt-rotation-") as name, Processes(Path(name) / "run") as processes:
        files = Files(Path(name))
        router, worker = files.start(processes)
        load = Load(files, router.address, outcome)
        async with load.running():
            targets = (files.keys, files.router, files.worker, files.cert, files.key)
            for round_number in range(max(1, round(3 * scale))):
                for path in targets if scale >= 1 or not round_number else targets[:1]:
                    for spoil in SPOILS.values() if scale >= 1 else (missing, half):
                        await spoil(path, path.read_bytes())
                        outcome.inputs += 1
            await _exchange(files, load, outcome)
        for process in (router, worker):
            if process.process.poll() is not None:
                outcome.leaked += 1
                outcome.problem(f"{process.name} ended: {process.output()[-500:]}")
    return outcome


async def _exchange(files: Files, load: Load, outcome: Outcome) -> None:
    """Good ones for good ones, and what was good before is good no more."""
    outcome.inputs += 3
    files.put_keys("key-1", "key-2")
    await _eventually(lambda: _enters(load.router, files, "key-2"), "a new key", outcome)
    if await _enters(load.router, files, "key-3"):
        outcome.wrong += 1
        outcome.problem("a key that nobody gave was let in")
    files.secrets = files.secrets.begun()
    files.put_credentials()
    await asyncio.sleep(SETTLE_S)
    files.secrets = files.secrets.switched()
    files.put_credentials()
    await asyncio.sleep(SETTLE_S)
    files.secrets = files.secrets.ended()
    files.put_credentials()
    files.authority.issue("server", "router", "worker", "controller")
    before, until_s = load.done, time.monotonic() + IN_FORCE_S
    while load.done < before + 2 * STREAMS and time.monotonic() < until_s:  # noqa: ASYNC110 - nobody else waits
        await asyncio.sleep(0.1)
    if load.done < before + 2 * STREAMS:
        outcome.lost += 1
        outcome.problem("streams stand still after the exchange")


async def _enters(router: str, files: Files, api_key: str) -> bool:
    async with TokenClient([router], tls=files.client("tries"), api_key=api_key) as client:
        try:
            await client.generate(MODEL, [1], max_tokens=1).tokens()
        except AuthError:
            return False
    return True


async def _eventually(condition: Callable[[], Any], what: str, outcome: Outcome) -> None:
    until_s = time.monotonic() + IN_FORCE_S
    while not await condition():
        if time.monotonic() > until_s:
            outcome.wrong += 1
            outcome.problem(f"{what} is not in force after {IN_FORCE_S:.0f} s")
            return
        await asyncio.sleep(0.2)
