"""TLS and mTLS on a real gRPC hop, with certificates made for the test."""

from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from megatoken.tls import ClientTls, ServerTls, bind, open_channel
from tests.support.certificates import Authority


async def _serving(server_tls: ServerTls, client_tls: ClientTls | None) -> bool:
    server = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
    port = bind(server, "127.0.0.1:0", server_tls)
    await server.start()
    try:
        async with open_channel(f"127.0.0.1:{port}", client_tls) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
            return answer.status == health_pb2.HealthCheckResponse.SERVING
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.UNAVAILABLE:
            raise
        return False
    finally:
        await server.stop(None)


async def test_a_client_that_trusts_the_authority_gets_through_and_no_other(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    cert_file, key_file = authority.issue("server")
    (tmp_path / "other").mkdir()
    stranger = Authority(tmp_path / "other")
    server = ServerTls(cert_file=cert_file, key_file=key_file)
    assert await _serving(server, ClientTls(ca_file=authority.ca_file))
    assert not await _serving(server, ClientTls(ca_file=stranger.ca_file))
    assert not await _serving(server, None)


async def test_mtls_asks_for_the_clients_certificate(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    cert_file, key_file = authority.issue("server")
    own_cert, own_key = authority.issue("client")
    server = ServerTls(cert_file=cert_file, key_file=key_file, client_ca_file=authority.ca_file)
    assert await _serving(server, ClientTls(ca_file=authority.ca_file, cert_file=own_cert, key_file=own_key))
    assert not await _serving(server, ClientTls(ca_file=authority.ca_file))


async def test_exchanged_certificates_are_shown_to_new_connections_and_running_streams_go_on(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    new.mkdir()
    before, after = Authority(old), Authority(new)
    cert_file, key_file = before.issue("server")
    new_cert, new_key = after.issue("server")
    server, checks = grpc.aio.server(), health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    port = bind(server, "127.0.0.1:0", ServerTls(cert_file=cert_file, key_file=key_file))
    await server.start()

    async def gets_through(authority: Authority) -> bool:
        async with open_channel(f"127.0.0.1:{port}", ClientTls(ca_file=authority.ca_file)) as channel:
            try:
                await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
            except grpc.aio.AioRpcError:
                return False
        return True

    try:
        assert await gets_through(before)
        assert not await gets_through(after)
        async with open_channel(f"127.0.0.1:{port}", ClientTls(ca_file=before.ca_file)) as channel:
            stream = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert (await stream.read()).status == health_pb2.HealthCheckResponse.SERVING
            key = key_file.read_bytes()
            key_file.unlink()
            assert await gets_through(before), "a file that is away for a moment changes nothing"
            key_file.write_bytes(new_key.read_bytes())
            assert await gets_through(before), "a key that does not fit changes nothing"
            cert_file.write_bytes(b"-----BEGIN CERTIFICATE-----\nhalf")
            assert await gets_through(before), "nor does half a file"
            cert_file.write_bytes(new_cert.read_bytes())
            assert await gets_through(after)
            assert not await gets_through(before)
            assert key != key_file.read_bytes()
            await checks.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
            assert (await stream.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING, "the stream went on"
            stream.cancel()
    finally:
        await server.stop(None)


@pytest.mark.parametrize("spoilt", ["of another", "half", "empty"])
def test_a_key_that_does_not_fit_is_an_error_and_not_the_end_of_the_process(tmp_path: Path, spoilt: str) -> None:
    authority = Authority(tmp_path)
    cert_file, key_file = authority.issue("client")
    other = authority.issue("other")[1].read_bytes()
    whole = key_file.read_bytes()
    key_file.write_bytes({"of another": other, "half": whole[:60], "empty": b""}[spoilt])
    with pytest.raises(OSError, match=r"client\.key"):
        ClientTls(ca_file=authority.ca_file, cert_file=cert_file, key_file=key_file).credentials()
    with pytest.raises(OSError, match=r"client\.key"):
        ServerTls(cert_file=cert_file, key_file=key_file).credentials()
    key_file.write_bytes(whole)
    ClientTls(ca_file=authority.ca_file, cert_file=cert_file, key_file=key_file).credentials()


def test_a_certificate_without_its_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="set together"):
        ClientTls(ca_file=tmp_path / "ca.pem", cert_file=tmp_path / "c.pem")
