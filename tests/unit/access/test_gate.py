"""The gate on a real server: each kind of method, each way to show who one is, plain and under mutual TLS."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from megatoken.access.channel import presenting
from megatoken.access.credentials import METADATA_KEY, ClusterSecrets, dump, new_secrets
from megatoken.access.files import CredentialsFile, write_private
from megatoken.access.gate import Gate
from megatoken.access.opening import gate_of
from megatoken.access.table import Identity, Program
from megatoken.errors import AuthError, RequestError
from megatoken.tls import ClientTls, ServerTls, bind, open_channel
from megatoken.v1 import control_pb2, control_pb2_grpc, throughput_pb2, throughput_pb2_grpc
from tests.support.certificates import Authority

OK, UNKNOWN, FORBIDDEN = grpc.StatusCode.OK, grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED


class Control(control_pb2_grpc.ControlServicer):
    """Answers everything; counts what reached it."""

    def __init__(self) -> None:
        self.reached = 0

    async def GetStatus(self, request: Any, context: Any) -> control_pb2.ClusterStatus:
        self.reached += 1
        return control_pb2.ClusterStatus(cluster="c")

    async def GetLogs(self, request: Any, context: Any) -> AsyncIterator[control_pb2.LogChunk]:
        self.reached += 1
        yield control_pb2.LogChunk(text="one")
        yield control_pb2.LogChunk(text="two")


class Attendance(throughput_pb2_grpc.ThroughputAttendanceServicer):
    """A bidirectional stream."""

    async def Attend(self, messages: Any, context: Any) -> AsyncIterator[throughput_pb2.AttendanceReply]:
        async for _ in messages:
            yield throughput_pb2.AttendanceReply(epoch=7)


@asynccontextmanager
async def served(
    folder: Path, cluster: ClusterSecrets, tls: ServerTls | None = None
) -> AsyncIterator[tuple[str, Control]]:
    path = folder / "controller.credentials"
    write_private(path, dump(cluster.credentials(Identity.CONTROLLER, Program.CONTROLLER)))
    gate = Gate(Program.CONTROLLER, CredentialsFile(path), certificates=tls is not None)
    server, control = grpc.aio.server(interceptors=[gate]), Control()
    control_pb2_grpc.add_ControlServicer_to_server(control, server)
    throughput_pb2_grpc.add_ThroughputAttendanceServicer_to_server(Attendance(), server)
    port = bind(server, "127.0.0.1:0", tls)
    await server.start()
    try:
        yield f"127.0.0.1:{port}", control
    finally:
        await server.stop(None)


async def outcomes(channel: Any) -> list[grpc.StatusCode]:
    """The status of a unary call, a stream down, and a stream both ways."""
    found = []
    for call in (_status, _logs, _attend):
        try:
            async with asyncio.timeout(10):
                await call(channel)
            found.append(OK)
        except grpc.aio.AioRpcError as error:
            found.append(error.code())
    return found


async def _status(channel: Any) -> None:
    answer = await control_pb2_grpc.ControlStub(channel).GetStatus(control_pb2.GetStatusRequest())
    assert answer.cluster == "c"


async def _logs(channel: Any) -> None:
    chunks = [chunk.text async for chunk in control_pb2_grpc.ControlStub(channel).GetLogs(control_pb2.GetLogsRequest())]
    assert chunks == ["one", "two"]


async def _attend(channel: Any) -> None:
    call = throughput_pb2_grpc.ThroughputAttendanceStub(channel).Attend()
    await call.write(throughput_pb2.Attendance())
    assert (await call.read()).epoch == 7
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF


def shows(token: str) -> Any:
    return lambda: ((METADATA_KEY, token),)


async def test_a_token_opens_what_the_table_says_and_nothing_else(tmp_path: Path) -> None:
    cluster = new_secrets()
    async with served(tmp_path, cluster) as (address, control), grpc.aio.insecure_channel(address) as channel:
        assert await outcomes(channel) == [UNKNOWN] * 3
        assert await outcomes(presenting(channel, shows("megatoken-operator-guessed"))) == [UNKNOWN] * 3
        assert await outcomes(presenting(channel, shows(new_secrets().token(Identity.OPERATOR)))) == [UNKNOWN] * 3
        assert await outcomes(presenting(channel, shows(cluster.token(Identity.ROUTER)))) == [FORBIDDEN] * 3
        assert control.reached == 0, "a refused call reached its service"
        operator = presenting(channel, shows(cluster.token(Identity.OPERATOR)))
        assert await outcomes(operator) == [OK, OK, FORBIDDEN]
        agent = presenting(channel, shows(cluster.token(Identity.AGENT)))
        assert await outcomes(agent) == [FORBIDDEN, FORBIDDEN, OK]
        twice = (*shows(cluster.token(Identity.OPERATOR))(), *shows(cluster.token(Identity.AGENT))())
        assert await outcomes(presenting(channel, lambda: twice)) == [UNKNOWN] * 3, "two tokens say nothing"


async def test_a_certificate_counts_by_its_role_only(tmp_path: Path) -> None:
    cluster, authority = new_secrets(), Authority(tmp_path)
    cert, key = authority.issue("server")
    tls = ServerTls(cert_file=cert, key_file=key, client_ca_file=authority.ca_file)
    async with served(tmp_path, cluster, tls) as (address, control):
        for name, roles, wanted in (
            ("plain", (), [UNKNOWN] * 3),
            ("operator", ("operator",), [OK, OK, UNKNOWN]),
            ("node", ("router", "worker", "agent"), [UNKNOWN, UNKNOWN, OK]),
            ("unheard-of", ("emperor",), [UNKNOWN] * 3),
        ):
            own_cert, own_key = authority.issue(name, *roles)
            client = ClientTls(ca_file=authority.ca_file, cert_file=own_cert, key_file=own_key)
            before = control.reached
            async with open_channel(address, client) as channel:
                assert await outcomes(channel) == wanted, name
                assert control.reached - before == wanted.count(OK) - (wanted[2] is OK)
                operator = presenting(channel, shows(cluster.token(Identity.OPERATOR)))
                assert (await outcomes(operator))[:2] == [OK, OK]


def test_a_door_to_the_network_without_a_gate_must_be_meant() -> None:
    for host in ("127.0.0.1", "::1", "localhost", "127.1.2.3"):
        assert gate_of(Program.WORKER, None, host, unguarded=False, certificates=False) is None
    for host in ("0.0.0.0", "::", "10.1.2.3", "node-a"):
        with pytest.raises(RequestError, match=r"^credentials_file: None is not allowed; .*unguarded: true"):
            gate_of(Program.WORKER, None, host, unguarded=False, certificates=False)
        assert gate_of(Program.WORKER, None, host, unguarded=True, certificates=False) is None


def test_a_client_is_asked_for_its_key_and_told_what_is_wrong_with_it(tmp_path: Path) -> None:
    path, cluster = tmp_path / "router.credentials", new_secrets()
    write_private(path, dump(cluster.credentials(Identity.ROUTER, Program.ROUTER)))

    def is_client(metadata: Any) -> None:
        if ("x-api-key", "good") not in metadata:
            raise AuthError("an API key is needed")

    gate = Gate(Program.ROUTER, CredentialsFile(path), is_client)

    class Details:
        method = "/megatoken.v1.Router/Assign"
        invocation_metadata: tuple[tuple[str, str], ...] = ()

    handler = grpc.unary_unary_rpc_method_handler(lambda _request, _context: None)

    async def find(_details: Any) -> Any:
        return handler

    for metadata, passes in (((), False), ((("x-api-key", "bad"),), False), ((("x-api-key", "good"),), True)):
        Details.invocation_metadata = metadata
        assert (asyncio.run(gate.intercept_service(find, Details)) is handler) is passes
    Details.method, Details.invocation_metadata = "/megatoken.v1.Router/GetRouterStatus", (("x-api-key", "good"),)
    assert asyncio.run(gate.intercept_service(find, Details)) is not handler, "a client is no operator"
    Details.invocation_metadata = ((METADATA_KEY, cluster.token(Identity.CONTROLLER)),)
    assert asyncio.run(gate.intercept_service(find, Details)) is handler, "the controller needs no API key"
