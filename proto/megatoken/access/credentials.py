"""What a process shows of itself and what it accepts of others, and a cluster's secrets, from which both are made.

A token is derived from a secret and an identity. Whoever has the secret (the controller) can make every token; a
process that was given one token can make no other. What a process accepts it knows by hash only, so a worker tells a
router when it meets one and cannot pass for one. files.py keeps these values in files of mode 600. Pure.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from collections.abc import Mapping
from typing import Final

from pydantic import BaseModel, ConfigDict, Field

from megatoken.access.table import Identity, Program, known_to

METADATA_KEY: Final = "megatoken-credential"
SECRET_BYTES: Final = 32


class Credentials(BaseModel):
    """One process's own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    token: str = Field(repr=False, description="what it shows to others")
    accepted: Mapping[Identity, tuple[str, ...]] = Field(description="by identity: hex SHA-256 of its tokens")
    lease_keys: tuple[str, ...] = Field((), repr=False, description="hex; the first signs, each verifies")


class ClusterSecrets(BaseModel):
    """The secrets of a cluster, newest first. In a rotation both are accepted; `presented` says which is shown."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    secrets: tuple[str, ...] = Field(min_length=1, max_length=2, repr=False, description="hex")
    presented: int = Field(0, ge=0, le=1, description="index of the one that processes show")

    def token(self, identity: Identity) -> str:
        """The token of an identity. Its first words tell people, and scanners of leaked secrets, what it is."""
        return _token(self.secrets[self.presented], identity)

    def credentials(self, own: Identity, program: Program, replica: str = "") -> Credentials:
        """Of one process: `own` is what it is to others, `program` what it serves, `replica` a worker's id."""
        accepted = {
            identity: tuple(_hash(_token(secret, identity)) for secret in self.secrets)
            for identity in known_to(program)
        }
        shown_first = sorted(range(len(self.secrets)), key=lambda index: index != self.presented)
        keys = [_lease_key(self.secrets[index]) for index in shown_first]
        if program is Program.WORKER:
            keys = [replica_lease_key(key, replica) for key in keys]
        leases = tuple(keys) if program in (Program.WORKER, Program.ROUTER) else ()
        return Credentials(token=self.token(own), accepted=accepted, lease_keys=leases)

    # -- a rotation, in three steps; processes are told after each --

    @property
    def rotating(self) -> bool:
        """Whether an older secret is still accepted."""
        return len(self.secrets) > 1

    def begun(self) -> ClusterSecrets:
        """A new secret is accepted; the old one is still shown, until everybody accepts the new."""
        return ClusterSecrets(secrets=(new_secret(), self.secrets[self.presented]), presented=1)

    def switched(self) -> ClusterSecrets:
        """The new secret is shown; the old one is still accepted, for calls on their way and files not yet fetched."""
        return self.model_copy(update={"presented": 0})

    def ended(self) -> ClusterSecrets:
        """The old secret is worth nothing any more."""
        return ClusterSecrets(secrets=self.secrets[:1])


def new_secrets() -> ClusterSecrets:
    """The secrets of a new cluster."""
    return ClusterSecrets(secrets=(new_secret(),))


def new_secret() -> str:
    return secrets.token_hex(SECRET_BYTES)


def replica_lease_key(key: str, replica: str) -> str:
    """The key that a router signs this replica's leases with: all that a worker has, so it can forge no other's."""
    return _derived(key, f"lease of {replica}")


def identify(credentials: Credentials, token: str) -> Identity | None:
    """Whom an accepted token stands for. Tokens are looked up by hash, so the time taken tells nothing of them."""
    digest = _hash(token)
    return next((identity for identity, known in credentials.accepted.items() if digest in known), None)


def dump(value: Credentials | ClusterSecrets) -> str:
    """JSON with the secrets in it, for a file that only its owner reads."""
    return json.dumps(value.model_dump(mode="json"))


def _token(secret: str, identity: Identity) -> str:
    return f"megatoken-{identity}-{_derived(secret, f'token of {identity}')}"


def _lease_key(secret: str) -> str:
    return _derived(secret, "leases")


def _derived(secret: str, purpose: str) -> str:
    return hmac.new(bytes.fromhex(secret), purpose.encode(), hashlib.sha256).hexdigest()


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()
