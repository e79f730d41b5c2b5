"""Every method of every program, called by everybody, plain, under TLS and under mutual TLS: the table, enforced.

Worker, router and agent are real processes; the controller's real server stands before a controller that does nothing.
A call is let in when it ends with anything but UNAUTHENTICATED or PERMISSION_DENIED.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import tempfile
import time
import types
import uuid
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc
from google.protobuf.descriptor import MethodDescriptor
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from megatoken.access.channel import presenting
from megatoken.access.credentials import METADATA_KEY, ClusterSecrets, dump, new_secrets, replica_lease_key
from megatoken.access.files import CredentialsFile, write_private
from megatoken.access.lease import LeaseTerms, sign
from megatoken.access.table import METHODS, TOKENED, Identity, Program, callers_of
from megatoken.cluster.controller.server import ControlServer
from megatoken.tls import ClientTls, ServerTls, open_channel
from megatoken.v1 import control_pb2, membership_pb2, router_pb2, throughput_pb2, tokens_pb2, worker_pb2
from megatoken.worker.throughput.attendance import AttendanceServicer
from tests.chaos.outcome import Outcome
from tests.support.certificates import Authority
from tests.support.processes import Processes

NAME = "access"
ABOUT = "every method of every program called by everybody, plain, with TLS and with mutual TLS"

CALL_S: Final = 0.4  # a stream that says nothing for this long has let the caller in
PATIENT_S: Final = (5.0, 20.0)  # before that is called wrong: a busy machine answers late
AT_ONCE: Final = 32
REFUSED: Final = {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED}
REFUSED_NUMBERS: Final = {code.value[0] for code in REFUSED}
FILES: Final = (
    *(control_pb2, membership_pb2, router_pb2, throughput_pb2, tokens_pb2, worker_pb2),
    *(health_pb2, reflection_pb2),
)
REPLICA, MODEL, KEY = "m-1", "m", "client-key"
TRANSPORTS: Final = ("plain", "tls", "mutual")


@dataclass(frozen=True)
class Caller:
    """Who calls: what is shown, and the identities that it should count as."""

    name: str
    metadata: tuple[tuple[str, str], ...] = ()
    roles: tuple[str, ...] = ()
    leased: bool = False
    counts_as: frozenset[Identity] = frozenset()


def methods() -> dict[str, MethodDescriptor]:
    """By /package.Service/Method: every method that any program of ours could serve."""
    found = {}
    for file in FILES:
        for service in file.DESCRIPTOR.services_by_name.values():
            found |= {f"/{service.full_name}/{method.name}": method for method in service.methods}
    return found


def callers(cluster: ClusterSecrets, *, certificates: bool) -> list[Caller]:
    """Everybody."""
    stranger = new_secrets()
    everybody = [
        Caller("anonymous"),
        Caller("guesser", ((METADATA_KEY, "megatoken-operator-" + "0" * 64),)),
        Caller("another cluster's operator", ((METADATA_KEY, stranger.token(Identity.OPERATOR)),)),
        Caller("two tokens", ((METADATA_KEY, cluster.token(Identity.OPERATOR)),) * 2),
        Caller("unknown key", (("authorization", "Bearer wrong"),)),
        Caller("client", (("authorization", f"Bearer {KEY}"),), counts_as=frozenset({Identity.CLIENT})),
        Caller("lease holder", leased=True, counts_as=frozenset({Identity.LEASE})),
        *(
            Caller(f"{identity} by token", ((METADATA_KEY, cluster.token(identity)),), counts_as=frozenset({identity}))
            for identity in TOKENED
        ),
    ]
    if certificates:
        everybody += [Caller("emperor by certificate", roles=("emperor",))]
        everybody += [
            Caller(f"{identity} by certificate", roles=(identity.value,), counts_as=frozenset({identity}))
            for identity in TOKENED
        ]
    return everybody


class Fleet:
    """One process of each program behind one kind of transport."""

    def __init__(self, folder: Path, transport: str, cluster: ClusterSecrets) -> None:
        self.folder, self.transport, self.cluster = folder, transport, cluster
        self.authority = Authority(folder)
        self.addresses: dict[Program, str] = {}
        self.incarnation = 0

    def new_lease(self) -> str:
        """Good for one request."""
        root = self.cluster.credentials(Identity.ROUTER, Program.ROUTER).lease_keys[0]
        until_s = int(time.time()) + 600
        terms = LeaseTerms(uuid.uuid4().hex, REPLICA, self.incarnation, "q", MODEL, 8, 8, until_s)
        return sign(terms, bytes.fromhex(replica_lease_key(root, REPLICA)))

    def server_tls(self) -> ServerTls | None:
        if self.transport == "plain":
            return None
        cert, key = self.authority.issue("server")
        authority = self.authority.ca_file if self.transport == "mutual" else None
        return ServerTls(cert_file=cert, key_file=key, client_ca_file=authority)

    def client_tls(self, caller: Caller) -> ClientTls | None:
        if self.transport == "plain":
            return None
        if self.transport == "tls":
            return ClientTls(ca_file=self.authority.ca_file)
        cert, key = self.authority.issue("client-" + "-".join(caller.roles or ("plain",)), *caller.roles)
        return ClientTls(ca_file=self.authority.ca_file, cert_file=cert, key_file=key)

    def credentials(self, own: Identity, program: Program) -> str:
        path = self.folder / f"{program}.credentials"
        write_private(path, dump(self.cluster.credentials(own, program, REPLICA)))
        return str(path)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        tls = self.server_tls()
        keys = self.folder / "keys.json"
        write_private(
            keys, json.dumps({"keys": [{"name": "team", "sha256": hashlib.sha256(KEY.encode()).hexdigest()}]})
        )
        shown = tls.model_dump(mode="json") if tls is not None else None
        common = {"metrics_port": None, "counters_dir": str(self.folder / "counters")}
        engine = {"replica": REPLICA, "model": MODEL, "engine": "simulated", "simulated": {}}
        server = await self._controller(tls)
        controllers = [self.addresses[Program.CONTROLLER]]
        try:
            with Processes(self.folder / "run") as processes:
                own = self.credentials(Identity.WORKER, Program.WORKER)
                worker = processes.start("worker", common | engine | {"tls": shown, "credentials_file": own})
                own = self.credentials(Identity.ROUTER, Program.ROUTER)
                secured = {"tls": shown, "api_keys_file": str(keys), "credentials_file": own}
                router = processes.start("router", common | secured | {"router": "r"})
                own = self.credentials(Identity.AGENT, Program.AGENT)
                node = {"node": "n", "controllers": controllers, "tls": shown, "credentials_file": own}
                towards = self.client_tls(Caller("agent"))
                node["controller_tls"] = towards.model_dump(mode="json") if towards is not None else None
                agent = processes.start("worker.throughput", common | node)
                self.addresses |= {
                    Program.WORKER: worker.address,
                    Program.ROUTER: router.address,
                    Program.AGENT: agent.address,
                }
                self.incarnation = int(worker.ready["incarnation"])
                yield
        finally:
            await server.stop()

    async def _controller(self, tls: ServerTls | None) -> ControlServer:
        credentials = CredentialsFile(Path(self.credentials(Identity.CONTROLLER, Program.CONTROLLER)))
        server = ControlServer(types.SimpleNamespace(credentials=credentials), tls)  # type: ignore[arg-type]
        AttendanceServicer(lambda _group, _why: None).attach(server.server)
        self.addresses[Program.CONTROLLER] = f"127.0.0.1:{await server.start('127.0.0.1', 0)}"
        return server


async def lets_in(channel: Any, method: MethodDescriptor, lease: str, call_s: float) -> bool:
    """Whether the call gets past the door."""
    path = f"/{method.containing_service.full_name}/{method.name}"
    kind = ("stream" if method.client_streaming else "unary") + "_" + ("stream" if method.server_streaming else "unary")
    call = getattr(channel, kind)(path)
    request = tokens_pb2.GenerateRequest(
        request_id="q", model=MODEL, prompt=[1], lease=lease, sampling=tokens_pb2.SamplingParams(max_tokens=1)
    )
    body = b""
    if method.containing_service.name == "Tokens":
        frame = tokens_pb2.ClientFrame(start=[tokens_pb2.Start(stream=1, request=request)])
        body = (frame if method.client_streaming else request).SerializeToString()
    try:
        if not method.server_streaming:
            await call(body, timeout=call_s)
            return True
        stream = call(timeout=call_s) if method.client_streaming else call(body, timeout=call_s)
        if method.client_streaming:
            if method.name == "Session":
                await stream.initial_metadata()  # one who writes to a refused call hears another reason
            await stream.write(body)
        return await _first_is_no_refusal(stream, method)
    except grpc.aio.AioRpcError as error:
        return error.code() not in REFUSED
    except asyncio.InvalidStateError:  # the call ended while it was written to
        return (await stream.code()) not in REFUSED


async def _first_is_no_refusal(stream: Any, method: MethodDescriptor) -> bool:
    """A session refuses a request in its Finish; every other stream by its status."""
    while True:
        raw = await stream.read()
        if raw is grpc.aio.EOF:
            return (await stream.code()) not in REFUSED
        if method.name != "Session":
            return True
        finishes = tokens_pb2.Frame.FromString(raw).finish
        if finishes:
            return all(finish.code not in REFUSED_NUMBERS for finish in finishes)


async def run(scale: float) -> Outcome:
    """`scale` does not matter: all of it is run, each time."""
    outcome = Outcome(simulated=True)
    for transport in TRANSPORTS:
        with tempfile.TemporaryDirectory(prefix="mt-access-") as folder:
            cluster = new_secrets()
            fleet = Fleet(Path(folder), transport, cluster)
            async with fleet.running():
                await _try_all(fleet, outcome)
    return outcome


async def _try_all(fleet: Fleet, outcome: Outcome) -> None:
    places = asyncio.Semaphore(AT_ONCE)
    everything = methods()
    everybody = callers(fleet.cluster, certificates=fleet.transport == "mutual")
    # Drain goes last: a drained worker takes no lease any more.
    served = {program: sorted(METHODS[program], key=lambda path: path.endswith("/Drain")) for program in METHODS}

    async def attempt(program: Program, path: str, caller: Caller, channel: Any) -> None:
        allowed = callers_of(program, path)
        wanted = bool(allowed & (caller.counts_as | {Identity.ANYONE}))
        async with places:
            for call_s in (CALL_S, *PATIENT_S):
                lease = fleet.new_lease() if caller.leased else ""
                entered = await lets_in(channel, everything[path], lease, call_s)
                if entered is wanted:
                    break
        outcome.inputs += 1
        if entered is not wanted:
            outcome.wrong += 1
            done = "was let in" if entered else "was refused"
            outcome.problem(f"{fleet.transport}: {caller.name} {done} at {program} {path}")

    for caller in everybody:
        for program, paths in served.items():
            present = (lambda shown=caller.metadata: shown) if caller.metadata else None
            async with presenting(open_channel(fleet.addresses[program], fleet.client_tls(caller)), present) as channel:
                await asyncio.gather(*(attempt(program, path, caller, channel) for path in _others(paths)))
    for caller in everybody:
        present = (lambda shown=caller.metadata: shown) if caller.metadata else None
        async with presenting(
            open_channel(fleet.addresses[Program.WORKER], fleet.client_tls(caller)), present
        ) as channel:
            for path in set(served[Program.WORKER]) - set(_others(served[Program.WORKER])):
                await attempt(Program.WORKER, path, caller, channel)


def _others(paths: Iterable[str]) -> list[str]:
    return [path for path in paths if not path.endswith("/Drain")]
