"""A worker behind mutual TLS: who shows a certificate of the authority is served, and nobody else."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.support.processes import Processes
from tests.support.worker_client import generate


def name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def issue(directory: Path, common: str, issuer: tuple[x509.Name, ec.EllipticCurvePrivateKey] | None) -> tuple:
    """Writes <common>.pem and <common>.key; without an issuer, an authority of its own."""
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name(common))
        .issuer_name(issuer[0] if issuer else name(common))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), True)
    )
    certificate = builder.sign(issuer[1] if issuer else key, hashes.SHA256())
    (directory / f"{common}.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (directory / f"{common}.key").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return name(common), key


async def test_only_certificates_of_the_authority_are_served(tmp_path: Path) -> None:
    authority = issue(tmp_path, "authority", None)
    issue(tmp_path, "worker", authority)
    issue(tmp_path, "client", authority)
    read = lambda file: (tmp_path / file).read_bytes()  # noqa: E731
    tls = {
        "cert_file": str(tmp_path / "worker.pem"),
        "key_file": str(tmp_path / "worker.key"),
        "client_ca_file": str(tmp_path / "authority.pem"),
    }
    config = {"replica": "r", "model": "m", "engine": "simulated", "simulated": {}, "counters_dir": str(tmp_path)}
    with Processes() as processes:
        worker = processes.start("worker", {**config, "tls": tls})
        known = grpc.ssl_channel_credentials(read("authority.pem"), read("client.key"), read("client.pem"))
        unknown = grpc.ssl_channel_credentials(read("authority.pem"))
        async with grpc.aio.secure_channel(worker.address, known) as channel:
            tokens, _ = await generate(channel, [5], max_tokens=3)
            assert len(tokens) == 3
        for channel in (grpc.aio.secure_channel(worker.address, unknown), grpc.aio.insecure_channel(worker.address)):
            async with channel:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await generate(channel, [5], max_tokens=3)
                assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
