"""TLS of every gRPC hop: what a server shows, what a client checks, and channels made from it.

A server with `client_ca_file` asks every client for a certificate that this authority signed (mTLS). Without any of
this a hop is plain text, which is why everything binds to loopback unless told otherwise.

Certificates are exchanged while servers run: new connections get what the files hold then, and running ones go on. A
file that is missing, half written or does not fit its key leaves the last good ones in force.
"""

from __future__ import annotations

import logging
import ssl
from pathlib import Path

import grpc
import grpc.aio
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from pydantic import BaseModel, ConfigDict, Field, model_validator

from megatoken.log import log_event

logger = logging.getLogger(__name__)


class ServerTls(BaseModel):
    """What a server shows to its clients. PEM files."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cert_file: Path = Field(description="certificate chain")
    key_file: Path = Field(description="its private key")
    client_ca_file: Path | None = Field(None, description="set: clients must show a certificate of this authority")

    def credentials(self) -> grpc.ServerCredentials:
        """Credentials for add_secure_port; reads the files now, and again when they change. Raises OSError."""
        files = CertificateFiles(self)
        return grpc.dynamic_ssl_server_credentials(
            files.configuration(), files.changed_configuration, require_client_authentication=self.mutual
        )

    @property
    def mutual(self) -> bool:
        """Whether clients must show a certificate."""
        return self.client_ca_file is not None


class CertificateFiles:
    """The files of one server, and whether they changed."""

    def __init__(self, tls: ServerTls) -> None:
        self._tls = tls
        self._stamp = self._read_stamp()

    def changed(self) -> bool:
        """Whether the files differ from those of the last time, and fit each other. Never raises."""
        try:
            stamp = self._read_stamp()
            if stamp == self._stamp:
                return False
            self.load_into(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
        except (OSError, ssl.SSLError) as error:  # in the middle of an exchange, or a mistake
            log_event(logger, "tls.unusable", f"{self._tls.cert_file}: {error}", level=logging.WARNING)
            return False
        self._stamp = stamp
        log_event(logger, "tls.reloaded", str(self._tls.cert_file))
        return True

    def load_into(self, context: ssl.SSLContext) -> None:
        """Makes a context show and ask for what the files hold now. Raises OSError or ssl.SSLError."""
        context.load_cert_chain(self._tls.cert_file, self._tls.key_file)
        if self._tls.client_ca_file is not None:
            context.load_verify_locations(self._tls.client_ca_file)

    def configuration(self) -> grpc.ServerCertificateConfiguration:
        """What gRPC takes. Raises OSError."""
        tls = self._tls
        authority = tls.client_ca_file.read_bytes() if tls.client_ca_file else None
        pair = fitting_pair(tls.cert_file, tls.key_file)
        return grpc.ssl_server_certificate_configuration([pair], root_certificates=authority)

    def changed_configuration(self) -> grpc.ServerCertificateConfiguration | None:
        """For gRPC, which asks before each handshake; None: as before."""
        try:
            return self.configuration() if self.changed() else None
        except OSError:  # gone since the look a moment ago; the next connection looks again
            self._stamp = ()
            return None

    def _read_stamp(self) -> tuple[tuple[int, int, int], ...]:
        found = []
        for path in (self._tls.cert_file, self._tls.key_file, self._tls.client_ca_file):
            if path is not None:
                status = path.stat()
                found.append((status.st_mtime_ns, status.st_size, status.st_ino))
        return tuple(found)


class ClientTls(BaseModel):
    """What a client trusts, and what it shows of itself where the server asks. PEM files."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ca_file: Path = Field(description="authority that signed the servers' certificates")
    cert_file: Path | None = Field(None, description="this client's own certificate chain, for mTLS")
    key_file: Path | None = Field(None, description="its private key")
    server_name: str | None = Field(None, description="name in the servers' certificates, when it is not their address")

    @model_validator(mode="after")
    def _certificate_and_key_together(self) -> ClientTls:
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("cert_file and key_file are set together or not at all")
        return self

    def credentials(self) -> grpc.ChannelCredentials:
        """Credentials for secure_channel; reads the files now. Raises OSError, also for a key that does not fit."""
        key, chain = fitting_pair(self.cert_file, self.key_file) if self.cert_file and self.key_file else (None, None)
        return grpc.ssl_channel_credentials(
            root_certificates=self.ca_file.read_bytes(), private_key=key, certificate_chain=chain
        )


def fitting_pair(cert_file: Path, key_file: Path) -> tuple[bytes, bytes]:
    """(key, certificate chain) as read. Raises OSError when they do not fit: gRPC's core ends the process for that."""
    chain, key = cert_file.read_bytes(), key_file.read_bytes()
    try:
        fits = x509.load_pem_x509_certificate(chain).public_key() == load_pem_private_key(key, None).public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise OSError(f"{cert_file} or {key_file} is no whole PEM file: {error}") from None
    if not fits:
        raise OSError(f"{key_file} is not the key of {cert_file}")
    return key, chain


Options = list[tuple[str, object]]


def bind(server: grpc.aio.Server, address: str, tls: ServerTls | None) -> int:
    """Binds a server to host:port; returns the port. Raises RuntimeError (gRPC's) when the port is taken."""
    if tls is None:
        return server.add_insecure_port(address)
    return server.add_secure_port(address, tls.credentials())


def open_channel(address: str, tls: ClientTls | None, options: Options | None = None) -> grpc.aio.Channel:
    """A channel to host:port, plain or TLS."""
    if tls is None:
        return grpc.aio.insecure_channel(address, options=options)
    named: Options = [("grpc.ssl_target_name_override", tls.server_name)] if tls.server_name else []
    return grpc.aio.secure_channel(address, tls.credentials(), options=[*(options or []), *named])
