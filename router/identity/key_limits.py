"""What one tenant may still do now: requests, tokens and bytes a minute as token buckets, and requests at once. Pure.

Tokens are charged as prompt + expected output when a request enters, and put right when it ends.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatoken.errors import OverloadError
from megatoken.router.identity.api_keys import ApiKey


class KeyLimitError(OverloadError):
    """A key is over a limit of its own, however much room the fleet has."""


@dataclass(slots=True)
class Bucket:
    """Holds at most a minute's worth; refills evenly. May go below zero when a request was dearer than expected."""

    level: float
    at_s: float

    def fill(self, per_minute: float, now: float) -> None:
        self.level = min(per_minute, self.level + (now - self.at_s) * per_minute / 60)
        self.at_s = now

    def wait_s(self, need: float, per_minute: float) -> float:
        """Until `need` is there; a need beyond a minute's worth waits for a full bucket only."""
        return max(0.0, (min(need, per_minute) - self.level) * 60 / per_minute)


@dataclass(slots=True)
class Usage:
    """Of one tenant."""

    requests: Bucket | None = None
    tokens: Bucket | None = None
    bytes: Bucket | None = None
    live: int = 0

    def enter(self, key: ApiKey, requests: int, cost_tokens: int, now: float, size_bytes: int = 0) -> None:
        """Charges requests of `cost_tokens` and `size_bytes` together.

        Raises KeyLimitError with the time to come back, and charges nothing then.
        """
        if key.concurrency is not None and self.live + requests > key.concurrency:
            raise KeyLimitError(
                f"key {key.name!r} has {self.live} requests at once, its limit is {key.concurrency}", 1.0
            )
        if key.requests_per_minute is not None:
            self.requests = self._bucket(self.requests, key.requests_per_minute, requests, now, key.name, "requests")
        if key.tokens_per_minute is not None:
            self.tokens = self._bucket(self.tokens, key.tokens_per_minute, cost_tokens, now, key.name, "tokens")
        if key.bytes_per_minute is not None:
            self.bytes = self._bucket(self.bytes, key.bytes_per_minute, size_bytes, now, key.name, "bytes")
        if key.requests_per_minute is not None and self.requests is not None:
            self.requests.level -= requests
        if key.tokens_per_minute is not None and self.tokens is not None:
            self.tokens.level -= cost_tokens
        if key.bytes_per_minute is not None and self.bytes is not None:
            self.bytes.level -= size_bytes
        self.live += requests

    def leave(self, charged_tokens: int, used_tokens: int) -> None:
        """A request ended: gives back what it did not use."""
        self.live -= 1
        if self.tokens is not None:
            self.tokens.level += charged_tokens - used_tokens

    @staticmethod
    def _bucket(bucket: Bucket | None, per_minute: float, need: float, now: float, name: str, unit: str) -> Bucket:
        bucket = bucket or Bucket(per_minute, now)
        bucket.fill(per_minute, now)
        wait_s = bucket.wait_s(need, per_minute)
        if wait_s > 0:
            raise KeyLimitError(f"key {name!r} is over its limit of {per_minute:g} {unit} a minute", wait_s)
        return bucket
