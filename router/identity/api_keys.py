"""API keys: hashed at rest, compared in constant time, reloaded when their file changes.

The file is JSON, mode 600:

    {"keys": [{"name": "team-a", "sha256": "<hex of the key's SHA-256>", "models": ["smollm2"],
               "requests_per_minute": 600, "tokens_per_minute": 1000000, "concurrency": 64, "weight": 2}]}

`name` is the tenant: the unit of fairness and limits; two keys with one name (during a rotation) share both. A key has
at least 128 bits of randomness, so one SHA-256 is enough; a password would want a slow hash, and is not meant here.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatoken.log import log_event

log = logging.getLogger(__name__)


class ApiKey(BaseModel):
    """One key and what it may do. Unset limits do not limit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, max_length=128, description="the tenant")
    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="hex SHA-256 of the key")
    models: tuple[str, ...] | None = Field(default=None, description="models it may ask for; unset: all")
    requests_per_minute: float | None = Field(default=None, gt=0)
    tokens_per_minute: float | None = Field(default=None, gt=0, description="prompt + generated")
    bytes_per_minute: float | None = Field(default=None, gt=0, description="encoded requests")
    concurrency: int | None = Field(default=None, ge=1, description="requests at once")
    highest_priority: int = Field(default=0, description="the most urgent priority it may ask for; lower runs earlier")
    weight: float = Field(default=1.0, gt=0, description="share of a full fleet, relative to others")


class KeyFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    keys: tuple[ApiKey, ...] = ()


class KeyRing:
    """The keys of one file. `refresh` about once a second; a file that does not read leaves the last keys in force."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: tuple[int, int, int] | None = None
        self._keys: tuple[tuple[bytes, ApiKey], ...] = ()
        self._load()

    def find(self, secret: str) -> ApiKey | None:
        """The key that a caller showed; every key is compared, so the time tells nothing."""
        digest = hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()
        found = None
        for known, key in self._keys:
            if hmac.compare_digest(digest, known):
                found = key
        return found

    def by_name(self, name: str) -> ApiKey | None:
        """The last key of a tenant."""
        return next((key for _, key in reversed(self._keys) if key.name == name), None)

    def refresh(self) -> None:
        try:
            if self._read_stamp() == self._stamp:
                return
            self._load()
            log_event(log, "router.keys_reloaded", keys=len(self._keys))
        except (OSError, ValueError) as error:
            self._stamp = None
            log_event(log, "router.keys_unreadable", str(error), level=logging.ERROR)

    def _load(self) -> None:
        """Raises OSError, or ValueError with what is wrong and where; never a secret."""
        stamp = self._read_stamp()
        try:
            content = KeyFile.model_validate_json(self._path.read_bytes())
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in error.errors())
            raise ValueError(f"api_keys_file: {self._path}: {problems}") from None
        self._keys = tuple((bytes.fromhex(key.sha256), key) for key in content.keys)
        self._stamp = stamp

    def _read_stamp(self) -> tuple[int, int, int]:
        status = self._path.stat()
        return status.st_mtime_ns, status.st_size, status.st_ino
