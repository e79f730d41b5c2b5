"""TLS of every gRPC hop: what a server shows, what a client checks, and channels made from it.

A server with `client_ca_file` asks every client for a certificate that this authority signed (mTLS). Without any of
this a hop is plain text, which is why everything binds to loopback unless told otherwise.
"""

from __future__ import annotations

from pathlib import Path

import grpc
import grpc.aio
from pydantic import BaseModel, ConfigDict, Field, model_validator


class ServerTls(BaseModel):
    """What a server shows to its clients. PEM files."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cert_file: Path = Field(description="certificate chain")
    key_file: Path = Field(description="its private key")
    client_ca_file: Path | None = Field(None, description="set: clients must show a certificate of this authority")

    def credentials(self) -> grpc.ServerCredentials:
        """Credentials for add_secure_port; reads the files now."""
        return grpc.ssl_server_credentials(
            [(self.key_file.read_bytes(), self.cert_file.read_bytes())],
            root_certificates=self.client_ca_file.read_bytes() if self.client_ca_file else None,
            require_client_auth=self.client_ca_file is not None,
        )


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
        """Credentials for secure_channel; reads the files now."""
        return grpc.ssl_channel_credentials(
            root_certificates=self.ca_file.read_bytes(),
            private_key=self.key_file.read_bytes() if self.key_file else None,
            certificate_chain=self.cert_file.read_bytes() if self.cert_file else None,
        )


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
