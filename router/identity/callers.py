"""Who calls, may they, and how much. Without a keys file everyone may, as one anonymous tenant."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatoken.errors import AuthError
from megatoken.router.identity.key_limits import Usage
from megatoken.router.identity.shown_key import secret_in

if TYPE_CHECKING:
    from megatoken.router.identity.api_keys import ApiKey, KeyRing

ANONYMOUS = "anonymous"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who a call comes from, as its metadata shows."""

    tenant: str = ANONYMOUS
    key: ApiKey | None = None
    site: str = ""

    @property
    def highest_priority(self) -> int:
        """The most urgent priority that it may ask for; lower runs earlier."""
        return 0 if self.key is None else self.key.highest_priority


class CallerRegistry:
    """One for the process. Keys that were withdrawn stop working for running sessions too: each request looks again."""

    def __init__(self, keys: KeyRing | None = None) -> None:
        self.keys = keys
        self._usage: dict[str, Usage] = {}

    def identify(self, metadata: Iterable[tuple[str, str | bytes]] | None) -> Caller:
        """Raises AuthError. The key comes as `shown_key` reads it."""
        if self.keys is None:
            return Caller()
        secret = secret_in(metadata)
        if not secret:
            raise AuthError("an API key is needed, as metadata authorization: Bearer KEY")
        key = self.keys.find(secret)
        if key is None:
            raise AuthError("this API key is not known")
        return Caller(key.name, key)

    def admit(self, caller: Caller, model: str) -> Caller:
        """The caller with its key as it is now. Raises AuthError for a withdrawn key, or a model it may not use."""
        if self.keys is None or caller.key is None:
            return caller
        key = self.keys.by_name(caller.tenant)
        if key is None:
            raise AuthError("this API key is not known any more")
        if key.models is not None and model not in key.models:
            raise AuthError(f"model: this API key is not allowed {model!r}; one of: {', '.join(key.models)}")
        return caller if key is caller.key else Caller(key.name, key)

    def enter(self, caller: Caller, requests: int, cost_tokens: int, now: float, size_bytes: int = 0) -> None:
        """Charges the tenant. Raises KeyLimitError, and charges nothing then."""
        if caller.key is not None:
            self._usage.setdefault(caller.tenant, Usage()).enter(caller.key, requests, cost_tokens, now, size_bytes)

    def leave(self, caller: Caller, charged_tokens: int, used_tokens: int) -> None:
        """One request ended; what it was charged too much comes back."""
        if caller.key is not None:
            self._usage[caller.tenant].leave(charged_tokens, used_tokens)
