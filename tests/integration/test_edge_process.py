"""The edge as a process: what is wrong is said before the long start; TLS, keys and SIGTERM on a running one."""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import ipaddress
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.support.fake_router import END, FakeRouter
from tests.support.processes import Processes

MODEL = {"name": "tiny", "source": "builtin:tiny-llama", "max_model_len": 64}


def config(**changed: Any) -> dict[str, Any]:
    return {"edge": "e", "router": "127.0.0.1:9", "models": [MODEL], **changed}


def refused(tmp_path: Path, content: str) -> str:
    """Runs an edge that cannot start; returns what it says."""
    path = tmp_path / "edge.json"
    path.write_text(content)
    command = [sys.executable, "-m", "megatoken.router.edge", "--config", str(path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2, ended.stderr
    lines = ended.stderr.strip().splitlines()
    assert len(lines) == 1, ended.stderr
    assert "Traceback" not in ended.stderr
    return lines[0]


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refused(tmp_path, json.dumps(config(port=port)))
    assert f"port: {port}" in said
    assert "in use" in said


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"port": -1}, "port"),
        ({"models": [{**MODEL, "source": "builtin:nothing"}]}, "models.source"),
        ({"models": [{**MODEL, "extra_args": {"port": 1}}]}, "models.extra_args"),
        ({"api_keys_file": "/nowhere/keys.json"}, "/nowhere/keys.json"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_what_does_not_fit_is_named_at_once(tmp_path: Path, changed: dict[str, Any], named: str) -> None:
    assert named in refused(tmp_path, json.dumps(config(**changed)))


def make_certificate(directory: Path) -> tuple[Path, Path]:
    """A self-signed certificate of 127.0.0.1, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "edge")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    cert_file, key_file = directory / "cert.pem", directory / "key.pem"
    cert_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    plain = serialization.NoEncryption()
    key_file.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain))
    return cert_file, key_file


@pytest.mark.vllm
async def test_tls_keys_and_a_drain(tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    cert_file, key_file = make_certificate(tmp_path)
    keys_file = tmp_path / "keys.json"
    keys_file.write_text(json.dumps({"keys": [{"name": "a", "sha256": hashlib.sha256(b"secret").hexdigest()}]}))
    async with FakeRouter(lambda _: [504, 3575, END]) as router:
        with Processes() as processes:
            settings = config(
                router=router.address,
                api_keys_file=str(keys_file),
                tls={"cert_file": str(cert_file), "key_file": str(key_file)},
                limits={"drain_s": 20.0},
            )
            edge = await asyncio.to_thread(processes.start, "router.edge", settings, timeout_s=240)
            url = f"https://{edge.address}"
            trusting = ssl.create_default_context(cafile=str(cert_file))
            async with httpx.AsyncClient(verify=trusting, timeout=60) as client:
                assert (await client.get(url + "/v1/models")).status_code == 401
                client.headers["authorization"] = "Bearer secret"
                assert (await client.get(url + "/v1/models")).status_code == 200
                router.gate.clear()
                asking = asyncio.create_task(
                    client.post(url + "/v1/completions", json={"model": "tiny", "prompt": "Hi", "max_tokens": 4})
                )
                async with asyncio.timeout(30):
                    while not router.requests:  # noqa: ASYNC110 (the edge is another process)
                        await asyncio.sleep(0.02)
                os.kill(edge.pid, signal.SIGTERM)  # one request is running: it may end
                await asyncio.sleep(0.2)
                router.gate.set()
                assert (await asking).json()["choices"][0]["text"]
            status = await asyncio.to_thread(edge.process.wait, 30)
            assert status == 0, edge.output()
            assert router.keys == ["Bearer secret"]
            assert "secret" not in edge.output()
