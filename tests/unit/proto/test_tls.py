"""TLS and mTLS on a real gRPC hop, with certificates made for the test."""

import datetime
import ipaddress
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from megatoken.tls import ClientTls, ServerTls, bind, open_channel


class Authority:
    """A certificate authority of the test's own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test authority")])
        self.ca_file = folder / "ca.pem"
        self.ca_file.write_bytes(self._sign(self.name, self.key.public_key(), authority=True))

    def _sign(self, subject: x509.Name, key: ec.EllipticCurvePublicKey, *, authority: bool) -> bytes:
        now = datetime.datetime.now(datetime.UTC)
        names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(names, critical=False)
            .sign(self.key, hashes.SHA256())
        )
        return certificate.public_bytes(serialization.Encoding.PEM)

    def issue(self, name: str) -> tuple[Path, Path]:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        cert_file, key_file = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        cert_file.write_bytes(self._sign(subject, key.public_key(), authority=False))
        key_file.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return cert_file, key_file


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


def test_a_certificate_without_its_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="set together"):
        ClientTls(ca_file=tmp_path / "ca.pem", cert_file=tmp_path / "c.pem")
